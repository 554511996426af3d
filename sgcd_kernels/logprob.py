"""Per-token log-probabilities, entropies and normalisers of a language-model head, without its logits."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.backends import IMPLS
from sgcd_kernels.registered import logprob as registered
from sgcd_kernels.shard import name_of
from sgcd_kernels.types import LogprobStats
from sgcd_kernels.validation import check_choice, check_head, check_int, check_targets, tempering


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

    Gradients: hidden, weight, bias
    Backends: triton, cpp, torch
    Cost: 1 U forward, 3 U backward

    Raises ValueError for shapes, dtypes, devices, targets or temperatures that do not fit.

    >>> import torch
    >>> hidden, weight = torch.eye(2, 4, requires_grad=True), torch.zeros(8, 4)
    >>> stats = linear_logprob(hidden, weight, torch.tensor([3, -100]))  # eight equal words; the second is ignored
    >>> [round(x, 4) for x in stats.logp.tolist()], [round(x, 4) for x in stats.entropy.tolist()]
    ([-2.0794, 0.0], [2.0794, 0.0])
    >>> stats.logp.sum().backward()
    >>> hidden.grad.shape
    torch.Size([2, 4])
    """
    check_choice("impl", impl, IMPLS)
    check_int("ignore_index", ignore_index)
    leading = check_head(hidden, weight, bias, temperature, softcap)
    check_targets(targets, leading, hidden.device)
    cap = None if softcap is None else float(softcap)
    options = (*tempering(temperature), cap, ignore_index, impl, name_of(group))
    return LogprobStats(*registered.op(hidden, weight, targets, bias, *options))
