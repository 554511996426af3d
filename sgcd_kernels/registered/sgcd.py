"""The two steps of sgcd_loss around its three ops that look at data: sgcd::sgcd_inputs and sgcd::weigh_advantages."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgcd_kernels.registered.library import register
from sgcd_kernels.registered.sequences import segments_of, spread
from sgcd_kernels.shard import group_of, shard_range
from sgcd_kernels.validation import flat_targets

METRICS = (
    "entropy",
    "credit/mean_divergence",
    "credit/mean_weight",
    "credit/frac_salient",
    "credit/frac_saturated",
    "credit/num_spans",
    "credit/mean_span_length",
    "credit/teacher_entropy",
    "credit/inert",
)


def sgcd_inputs(
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    advantages: Tensor,  # like targets, or [B]
    cu_seqlens: Tensor | None,  # [B + 1]
    mask: Tensor | None,  # like targets
    credit_mask: Tensor | None,  # like targets
    ignore_index: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(targets, ignored where masked, and where a token may carry credit, both like `targets`; turns and advantages
    [N])"""
    leading = targets.shape
    flat = flat_targets(targets, shard_range(weight, group_of(group))[1], ignore_index, mask)
    loss_tokens = flat != ignore_index
    eligible = loss_tokens.clone() if credit_mask is None else loss_tokens & (credit_mask.reshape(-1) != 0)
    segments = segments_of(leading, cu_seqlens, targets.device)
    wide = torch.promote_types(advantages.dtype, torch.float32)
    per_token = spread(advantages, segments, leading, wide).clone()
    return flat.clone().reshape(leading), eligible.reshape(leading), _runs(loss_tokens), per_token


def _runs(loss_tokens: Tensor) -> Tensor:  # [N]
    """A number for each run of loss tokens. Runs that touch across sequences may share one: those are cut anyway."""
    return (loss_tokens & ~loss_tokens.roll(1)).cumsum(0)


def _fake_inputs(weight: Tensor, targets: Tensor, advantages: Tensor, *_: Any) -> tuple[Tensor, ...]:
    wide = torch.promote_types(advantages.dtype, torch.float32)
    return (
        targets.new_empty(targets.shape, dtype=torch.long),
        targets.new_empty(targets.shape, dtype=torch.bool),
        targets.new_empty(targets.numel(), dtype=torch.long),
        targets.new_empty(targets.numel(), dtype=wide),
    )


def weigh_advantages(
    advantages: Tensor,  # [N]
    weights: Tensor,  # [N]
    saliency: Tensor,  # [N]
    span_ids: Tensor,  # [N]
    divergence: Tensor,  # [N]
    student_entropy: Tensor,  # [N]
    teacher_entropy: Tensor,  # [N]
    loss_tokens: Tensor,  # [N] bool
    eligible: Tensor,  # [N] bool
    clip: float,
    idle: bool,  # the credit is meant to do nothing
) -> tuple[Tensor, Tensor]:
    """(A W, and what the credit did over the eligible tokens). A warning if it did nothing though it was meant to.

    Both in one op: the compiler drops what nobody reads, metrics and warnings too, but not the advantages.
    """
    # Sums under a mask: to select by one, the host would have to wait for how many there are.
    none = ~eligible
    no_divergence, no_weight = ((divergence == 0) | none).all(), ((weights == 1) | none).all()
    inert = eligible.any() & (no_divergence | no_weight)
    if not idle and bool(inert):
        what = "all divergences are 0" if no_divergence else "all weights are 1"
        so = ", so this is plain GRPO" if no_weight else ""
        warnings.warn(
            f"credit is inert: {what} over {eligible.sum()} eligible tokens{so}", RuntimeWarning, stacklevel=2
        )
    in_spans = eligible & (span_ids >= 0)
    count = _distinct(span_ids, in_spans)
    values = (
        _mean(student_entropy, loss_tokens),
        _mean(divergence, eligible),
        torch.where(eligible.any(), _mean(weights, eligible), 1.0),
        _mean((saliency > 0).float(), eligible),
        _mean((weights >= clip).float(), eligible),
        count,
        in_spans.sum() / count.clamp(min=1),
        _mean(teacher_entropy, eligible),
        inert,
    )
    return advantages * weights, torch.stack([value.to(divergence.dtype) for value in values])


def _mean(x: Tensor, over: Tensor) -> Tensor:
    """Of the tokens `over`; 0 of none."""
    return torch.where(over, x, 0.0).sum() / over.sum().clamp(min=1)


def _distinct(ids: Tensor, over: Tensor) -> Tensor:
    """How many of the ids, indices of tokens, occur among the tokens `over`."""
    seen = ids.new_zeros(ids.numel() + 1).scatter_(0, torch.where(over, ids, ids.numel()), 1)
    return seen[:-1].sum()


def _fake_weigh(
    advantages: Tensor, weights: Tensor, saliency: Tensor, span_ids: Tensor, divergence: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(advantages.dtype, weights.dtype)
    return advantages.new_empty(advantages.shape, dtype=dtype), divergence.new_empty(len(METRICS))


inputs_op: Callable[..., Any] = register(sgcd_inputs, _fake_inputs)
weigh_op: Callable[..., Any] = register(weigh_advantages, _fake_weigh)
