"""Per-token log-probabilities, entropies and normalisers of a language-model head, without its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.backends.protocol import IMPLS
from sgcd_kernels.backends.registry import backend_for, no_autocast
from sgcd_kernels.core.lm_head import HeadGrads, LMHead, Needs, Projection, empty_grads, stats_dtype
from sgcd_kernels.core.registration import register, restore, save
from sgcd_kernels.core.statistics import LogprobValues
from sgcd_kernels.core.validation import (
    check_choice,
    check_head,
    check_int,
    check_targets,
    checked_head,
    project_targets,
)


class LogprobStats(NamedTuple):
    """Per token, shaped like `targets`; fp32 (fp64 for fp64 inputs). Ignored tokens are 0 in every field."""

    logp: Tensor  # log p(y)
    entropy: Tensor  # -sum p log p, nats
    lse: Tensor  # log-sum-exp of the logits after softcap and temperature; logp is not made of this rounded number


def linear_logprob(
    hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or per token
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> LogprobStats:
    """log p(y), entropy and log-sum-exp of softmax(softcap(hidden weight^T + bias) / temperature).

    Results are shaped like `targets`, fp32 (fp64 for fp64 inputs), and differentiable in hidden, weight and bias. The
    backward pass recomputes the logits, so that no [N, V] matrix is held. Ignored tokens are not computed: their
    results and gradients are 0. `softcap` c means c tanh(z / c), applied before temperature.

    With `group`, `weight` (and `bias`) are this rank's rows of a vocab-sharded head and targets are global ids; every
    rank gets the full result, and the hidden gradient is summed over the ranks.

    A NaN or +inf logit makes the results of its token NaN, and of no other; -inf is a vocab id of probability 0.

    Gradients: hidden, weight, bias
    Backends: triton, cpp, torch
    Cost: 1 U forward, 3 U backward

    Raises ValueError for shapes, dtypes, devices, targets or temperatures that do not fit.

    >>> import torch
    >>> hidden, weight = torch.eye(2, 4, requires_grad=True), torch.zeros(8, 4)
    >>> stats = linear_logprob(hidden, weight, torch.tensor([3, -100]))  # 8 equal logits; the second token is ignored
    >>> [round(x, 4) for x in stats.logp.tolist()], [round(x, 4) for x in stats.entropy.tolist()]
    ([-2.0794, 0.0], [2.0794, 0.0])
    >>> stats.logp.sum().backward()
    >>> hidden.grad.shape
    torch.Size([2, 4])
    """
    check_choice("impl", impl, IMPLS)
    check_int("ignore_index", ignore_index)
    head = LMHead(weight, bias, softcap, temperature, group)
    leading = check_head(hidden, head)
    check_targets(targets, leading, hidden.device)
    values = logprob_op(hidden, head.with_constant_temperature(), targets, ignore_index, impl)
    assert values.logp is not None and values.entropy is not None and values.lse is not None
    return LogprobStats(values.logp, values.entropy, values.lse)


def _fake(hidden: Tensor, head: LMHead, targets: Tensor, *_: object) -> LogprobValues:
    dtype = stats_dtype(hidden, head.weight)
    return LogprobValues(*(targets.new_empty(targets.shape, dtype=dtype) for _ in LogprobValues._fields))


def _setup(
    ctx: Any, values: LogprobValues, hidden: Tensor, head: LMHead, targets: Tensor, ignore_index: int, impl: str
) -> None:
    inputs = {"hidden": hidden, "head": head, "targets": targets, "ignore_index": ignore_index, "impl": impl}
    save(ctx, **inputs, values=values)


def _backward(ctx: Any, upstream: LogprobValues) -> dict[str, Tensor | None]:
    at, needs = restore(ctx), Needs(*(ctx.needs[name] for name in ("hidden", "head_weight", "head_bias")))
    inputs = at.hidden, at.head, at.targets, at.ignore_index, at.impl
    grads = logprob_backward_op(*inputs, at.values, upstream, needs)
    return {"hidden": grads.hidden, "head_weight": grads.weight, "head_bias": grads.bias}


@register(_fake, _setup, _backward, differentiable=("logp", "entropy", "lse"))
def logprob_op(hidden: Tensor, head: LMHead, targets: Tensor, ignore_index: int, impl: str) -> LogprobValues:
    x, y = project_targets(hidden, head, targets, ignore_index)
    with no_autocast(hidden.device):
        values, _ = backend_for(impl, "logprob_forward", x).logprob_forward(x, y)
    return LogprobValues(*(None if value is None else x.scatter(value, targets.shape) for value in values))


def _fake_backward(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    ignore_index: int,
    impl: str,
    values: LogprobValues,
    upstream: LogprobValues,
    needs: Needs,
) -> HeadGrads:
    return empty_grads(hidden, head, needs)


@register(_fake_backward)
def logprob_backward_op(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    ignore_index: int,
    impl: str,
    values: LogprobValues,
    upstream: LogprobValues,
    needs: Needs,
) -> HeadGrads:
    y = targets.reshape(-1).long()
    x = Projection.of(hidden, checked_head(head)).on(y != ignore_index)

    def rows(given: LogprobValues) -> LogprobValues:
        return LogprobValues(*(None if value is None else x.gather(value.reshape(-1)) for value in given))

    with no_autocast(hidden.device):
        backend = backend_for(impl, "logprob_backward", x)
        grads = backend.logprob_backward(x, x.gather(y), rows(values), rows(upstream), needs)
    return grads.in_dtypes_of(hidden, head)
