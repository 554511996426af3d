"""Per-token log-probabilities, entropies and normalisers of a language-model head, without its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from sgcd_kernels.backends import eager, no_autocast, resolve
from sgcd_kernels.shard import shard_range
from sgcd_kernels.types import LogprobStats, Projection, ProjectionGrads
from sgcd_kernels.validation import check_targets, kept_rows, projection, scatter, take


@eager
def linear_logprob(
    hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or one a token
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> LogprobStats:
    """log p(y), entropy and log-sum-exp of softmax(softcap(hidden weight^T + bias) / temperature).

    Results are shaped like `targets`, fp32 (fp64 for fp64 inputs), and differentiable in hidden, weight and bias; the
    backward pass recomputes the logits, so nothing of size N x V is ever held. Ignored targets give 0 and no gradient
    and are not computed. `softcap` c means c tanh(z / c), applied before temperature.

    With `group`, `weight` (and `bias`) are this rank's rows of a vocab-sharded head and targets are global ids; every
    rank gets the full result, and the hidden gradient is summed over the ranks.

    A NaN or +inf logit makes that token's results NaN and no other's; a logit of -inf is a word of probability 0.

    Raises ValueError for shapes, dtypes, devices, targets or temperatures that do not fit.
    """
    p = projection(hidden, weight, bias, temperature, softcap)
    leading = hidden.shape[:-1]
    flat = check_targets(targets, leading, hidden.device, shard_range(weight, group)[1], ignore_index)
    rows = kept_rows(flat != ignore_index)
    inputs = (p.hidden, weight, bias, take(flat, rows), rows, p.temperature, softcap, impl, group)
    stats = _LinearLogprob.apply(*inputs)  # type: ignore[no-untyped-call]
    return LogprobStats(*(scatter(x, rows, leading) for x in stats))


class _LinearLogprob(torch.autograd.Function):
    """Saves only the inputs and two numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor | None,
        temperature: float | Tensor,
        softcap: float | None,
        impl: str,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = Projection(hidden, weight, bias, temperature, softcap, rows)
        with no_autocast(hidden.device):
            logp, entropy, lse = resolve("logprob_forward", impl, p)(p, targets, group)
        temperatures = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(hidden, weight, bias, targets, rows, temperatures, entropy, lse)
        ctx.scalars = (temperature if temperatures is None else 1.0, softcap, impl, group)
        ctx.set_materialize_grads(False)
        return logp, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, targets, rows, temperatures, entropy, lse = ctx.saved_tensors
        temperature, softcap, impl, group = ctx.scalars
        if d_logp is None and d_entropy is None and d_lse is None:
            return (None,) * 9
        p = Projection(hidden, weight, bias, temperature if temperatures is None else temperatures, softcap, rows)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        with no_autocast(hidden.device):
            grads = resolve("logprob_backward", impl, p)(
                p,
                targets,
                lse,
                torch.zeros_like(lse) if d_logp is None else d_logp,
                needs,
                entropy=entropy if d_entropy is not None else None,
                d_entropy=d_entropy,
                d_lse=d_lse,
                group=group,
            )
        return (*as_input_dtypes(grads, hidden, weight, bias), *(None,) * 6)


def as_input_dtypes(grads: ProjectionGrads, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients in the dtype of what they belong to."""
    return tuple(g if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))
