"""A drop-in for `verl.utils.kernel.linear_cross_entropy`: log-probs and entropies from hidden states.

from sgcd_kernels.integrations.verl import linear_cross_entropy
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.core.validation import check_choice, check_hidden
from sgcd_kernels.ops.logprob import linear_logprob

REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H], or this rank's rows
    labels: Tensor,  # [N] or [B, T]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(log p(labels), entropy), both fp32 and differentiable; `reduction` applies to the log-probs only, as in verl.

    As in verl, both are flat, [B * T], whatever the shape of the input.
    With `dist_process_group` the head is sharded by rows in the order of the ranks, and labels are global ids.

    Raises ValueError as `linear_logprob` does.

    >>> import torch
    >>> logp, entropy = linear_cross_entropy(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([3, 5]))
    >>> [round(x, 4) for x in (*logp.tolist(), *entropy.tolist())]
    [-2.0794, -2.0794, 2.0794, 2.0794]
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_hidden("hidden", hidden)
    flat = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
    stats = linear_logprob(flat, weight, labels.reshape(-1), temperature=temperature, group=dist_process_group)
    if reduction == "none":
        return stats.logp, stats.entropy
    return stats.logp.sum() if reduction == "sum" else stats.logp.mean(), stats.entropy
