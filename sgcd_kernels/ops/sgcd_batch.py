"""The credit inputs of `sgcd_loss`, and the ops before and after scoring: combine the masks, weigh the advantages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgcd_kernels.core.lm_head import LMHead
from sgcd_kernels.core.registration import register
from sgcd_kernels.core.segments import Segments, runs_of
from sgcd_kernels.core.validation import (
    FLAGS,
    check_pair,
    check_per_token,
    check_per_token_or_sequence,
    checked_targets,
)
from sgcd_kernels.credit.config import DEFAULT, CreditConfig, check_config
from sgcd_kernels.credit.rules import Credit
from sgcd_kernels.credit.summary import CreditSums, credit_sums, warn_if_inert
from sgcd_kernels.ops.policy_inputs import PolicyTokens, Settings


class Teacher(NamedTuple):
    """The teacher's side of a batch."""

    hidden: Tensor | None  # [N, H'] or [B, T, H']; None: no token has a teacher
    head: LMHead
    has_teacher: Tensor | None = None  # like targets, or [B]; None is everywhere


class CreditInputs(NamedTuple):
    """The inputs of a batch's credit, in addition to those of the policy loss."""

    teacher: Teacher
    credit_mask: Tensor | None = None  # like targets
    turn_ids: Tensor | None = None  # like targets
    config: CreditConfig = DEFAULT
    warn: bool = True  # when credit is inert


def check_credit_inputs(hidden: Tensor, settings: Settings, tokens: PolicyTokens, inputs: CreditInputs) -> None:
    """Refuse credit inputs that do not fit those of the policy loss."""
    teacher, leading = inputs.teacher, tokens.targets.shape
    check_config(inputs.config)
    if teacher.hidden is not None:
        check_pair(hidden, settings.head, teacher.hidden, teacher.head, "hidden")
    check_per_token("credit_mask", inputs.credit_mask, leading, hidden.device, FLAGS)
    check_per_token("turn_ids", inputs.turn_ids, leading, hidden.device)
    if tokens.cu_seqlens is None and len(leading) == 1:
        raise ValueError("cu_seqlens is None, needs [B + 1] for packed hidden [N, H]: credit stays within a sequence")
    sequences = leading[0] if tokens.cu_seqlens is None else tokens.cu_seqlens.numel() - 1
    if teacher.has_teacher is not None:
        like = ("hidden", hidden)
        check_per_token_or_sequence("has_teacher", teacher.has_teacher, leading, sequences, like, FLAGS)


class Batch(NamedTuple):
    """Targets and tokens after applying every mask; shaped like `targets`, except `runs`, which is flat."""

    targets: Tensor  # int64, `ignore_index` where there is no loss
    scored_targets: Tensor  # and where there is no teacher
    has_teacher: Tensor  # bool, loss tokens only
    eligible: Tensor  # bool
    advantages: Tensor
    runs: Tensor  # [N], the number of a token's run of loss tokens


def _fake_batch(head: LMHead, tokens: PolicyTokens, *_: object) -> Batch:
    targets, wide = tokens.targets, torch.promote_types(tokens.advantages.dtype, torch.float32)

    def like_targets(dtype: torch.dtype) -> Tensor:
        return targets.new_empty(targets.shape, dtype=dtype)

    return Batch(
        targets=like_targets(torch.long),
        scored_targets=like_targets(torch.long),
        has_teacher=like_targets(torch.bool),
        eligible=like_targets(torch.bool),
        advantages=like_targets(wide),
        runs=targets.new_empty(targets.numel(), dtype=torch.long),
    )


@register(_fake_batch)
def batch_op(
    head: LMHead, tokens: PolicyTokens, credit_mask: Tensor | None, has_teacher: Tensor | None, ignore_index: int
) -> Batch:
    shape, device = tokens.targets.shape, tokens.targets.device
    flat = checked_targets(tokens.targets, head, ignore_index, tokens.mask)
    loss_tokens = flat != ignore_index
    segments = Segments.of(shape, tokens.cu_seqlens, device)
    with_teacher = loss_tokens.clone()
    if has_teacher is not None:
        with_teacher &= segments.per_token(has_teacher.to(device), shape) != 0
    eligible = with_teacher.clone() if credit_mask is None else with_teacher & (credit_mask.reshape(-1) != 0)
    wide = torch.promote_types(tokens.advantages.dtype, torch.float32)
    advantages = segments.per_token(tokens.advantages.to(dtype=wide, device=device), shape)
    return Batch(
        targets=flat.clone().reshape(shape),
        scored_targets=flat.masked_fill(~with_teacher, ignore_index).reshape(shape),
        has_teacher=with_teacher.reshape(shape),
        eligible=eligible.reshape(shape),
        advantages=advantages.clone().reshape(shape),
        runs=runs_of(loss_tokens),
    )


class Weighed(NamedTuple):
    advantages: Tensor  # A W
    lse_known: Tensor
    sums: CreditSums


def _fake_weigh(batch: Batch, credit: Credit, divergence: Tensor, *_: object) -> Weighed:
    def scalar(dtype: torch.dtype) -> Tensor:
        return divergence.new_empty((), dtype=dtype)

    counts = {name: scalar(torch.long) for name in ("tokens", "spans", "in_spans", "diverging", "weighted")}
    totals = {name: scalar(divergence.dtype) for name in ("divergence", "teacher_entropy")}
    weights = {"weights": scalar(credit.weights.dtype), "salient": scalar(torch.float32)}
    sums = CreditSums(**counts, **totals, **weights, saturated=scalar(torch.float32))
    dtype = torch.promote_types(batch.advantages.dtype, credit.weights.dtype)
    advantages = batch.advantages.new_empty(batch.advantages.shape, dtype=dtype)
    return Weighed(advantages, torch.empty_like(batch.has_teacher), sums)


@register(_fake_weigh)
def weigh_op(
    batch: Batch, credit: Credit, divergence: Tensor, teacher_entropy: Tensor, clip: float, warn: bool
) -> Weighed:
    # Warning and advantages in one op: the compiler would drop an op that only warns, because nothing depends on it.
    sums = credit_sums(credit, divergence, teacher_entropy, batch.eligible, clip)
    if warn:
        warn_if_inert(sums)
    return Weighed(batch.advantages * credit.weights, batch.has_teacher & (sums.weighted > 0), sums)


def _fake_masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_empty(())


@register(_fake_masked_mean)
def masked_mean_op(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values under the mask; 0 of none. An op, because compiled code would sum in another order."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
