"""A drop-in for `cut_cross_entropy.linear_cross_entropy`: cross-entropy from hidden states, without gradient filtering.

from sgcd_kernels.integrations.cut_cross_entropy import linear_cross_entropy
"""

from __future__ import annotations

from torch import Tensor

from sgcd_kernels.core.validation import check_choice, check_int, check_tensor
from sgcd_kernels.ops.logprob import linear_logprob

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    e: Tensor,  # [..., H], one or two leading dimensions
    c: Tensor,  # [V, H]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    impl: str = "auto",
) -> Tensor:
    """-log softmax(softcap(e c^T + bias))[targets] in fp32, per token or reduced over the tokens not ignored.

    `shift` n (True is 1): position i predicts target i + n. With reduction "none" the result has the shape of
    `targets` minus n columns; ignored tokens give 0. There is no `filter_eps`: small gradients are not dropped.

    Raises ValueError as `linear_logprob` does, and for a shift of [N, H] or beyond the sequence.

    >>> import torch
    >>> e, c, targets = torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([3, 5])
    >>> round(linear_cross_entropy(e, c, targets).item(), 4)  # ln 8
    2.0794
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if shift:
        check_tensor("targets", targets)
        check_int("shift", int(shift) if isinstance(shift, bool) else shift)
        if targets.dim() != 2 or not 0 < shift < targets.shape[1]:
            raise ValueError(f"shift is {shift}, needs [B, T] targets with T above it, got {list(targets.shape)}")
        e, targets = e[:, : -int(shift)], targets[:, int(shift) :]
    loss = -linear_logprob(e, c, targets, bias=bias, softcap=softcap, ignore_index=ignore_index, impl=impl).logp
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()
