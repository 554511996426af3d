"""From a micro-batch's hidden states to its weighted advantages, and what to report of them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from sgcd_kernels import CreditConfig, credit_weights, linear_divergence
from sgcd_kernels.credit_rules import USE_GAMMA
from sgcd_kernels.integrations.trl.head import IGNORED, Unprojected


def idle(config: CreditConfig) -> bool:
    """Whether every weight is 1 whatever a teacher says."""
    return config.rule == "none" or (config.rule in USE_GAMMA and config.gamma == 0)


@dataclass(frozen=True)
class Batch:
    """What weighing needs to know of the completions."""

    targets: Tensor  # [B, T]
    mask: Tensor  # [B, T], 1 where a token has a loss: the model's own, and no padding
    advantages: Tensor  # [B]
    referenced: Tensor  # [B] bool: the row's teacher reads something that its student does not


@torch.no_grad()
def weigh(
    student: Unprojected,  # [B, T]
    teacher: Unprojected,  # [B, T]
    batch: Batch,
    config: CreditConfig,
) -> tuple[Tensor, Tensor]:
    """(A W [B, T], the sums of `metrics`). Rows without a reference, and tokens without a loss, keep W = 1, d = 0.

    Temperature, softcap and head are the student's for both. A span of credit ends with its run of loss tokens, so none
    reaches past a tool's answer.
    """
    shape = batch.targets.shape
    eligible = (batch.mask != 0) & batch.referenced[:, None]
    stats = linear_divergence(
        student.hidden,
        student.weight,
        batch.targets.masked_fill(~eligible, IGNORED),
        teacher.hidden,
        bias=student.bias,
        temperature=student.temperature,
        softcap=student.softcap,
        ignore_index=IGNORED,
    )
    per_token = batch.advantages[:, None].expand(shape)
    credit = credit_weights(
        stats.reverse_kl.reshape(-1),
        stats.teacher_entropy.reshape(-1),
        torch.arange(shape[0] + 1, device=eligible.device) * shape[1],
        mask=eligible.reshape(-1),
        turn_ids=_turns(batch.mask != 0).reshape(-1),
        advantages=per_token.reshape(-1),
        log_ratio=(stats.teacher_logp - stats.student_logp).reshape(-1),
        forward_kl=stats.forward_kl.reshape(-1),
        bhattacharyya=stats.bhattacharyya.reshape(-1),
        student_entropy=stats.student_entropy.reshape(-1),
        config=config,
    )
    d, h = stats.reverse_kl[eligible], stats.teacher_entropy[eligible]
    w, s, spans = (x.reshape(shape)[eligible] for x in (credit.weights, credit.saliency, credit.span_ids))
    inside = spans[spans >= 0]
    counts = (len(d), len(inside), len(torch.unique(inside)), len(eligible), batch.referenced.sum(), (w != 1).sum())
    values = (d.sum(), w.sum(), (s > 0).sum(), (w >= config.clip).sum(), h.sum())
    sums = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=d.device) for x in (*values, *counts)])
    return per_token * credit.weights.reshape(shape), sums


def _turns(loss_tokens: Tensor) -> Tensor:  # [B, T] bool -> [B, T]
    """A number for each run of loss tokens in a row."""
    before = torch.nn.functional.pad(loss_tokens, (1, -1))
    return (loss_tokens & ~before).cumsum(-1)


def metrics(sums: Tensor) -> dict[str, float]:
    """`credit/*` of sums over micro-batches or processes. Warns if credit was asked for and none was given."""
    d, w, salient, saturated, h, tokens, inside, spans, rows, referenced, weighted = sums.tolist()
    inert = tokens > 0 and (d == 0 or weighted == 0)
    if inert:
        what = "all divergences are 0" if d == 0 else "all weights are 1"
        warnings.warn(f"credit is inert: {what} over {tokens:.0f} eligible tokens", RuntimeWarning, stacklevel=2)
    among = max(tokens, 1)
    return {
        "credit/mean_divergence": d / among,
        "credit/mean_weight": w / among if tokens else 1.0,
        "credit/frac_salient": salient / among,
        "credit/frac_saturated": saturated / among,
        "credit/num_spans": spans,
        "credit/mean_span_length": inside / max(spans, 1),
        "credit/teacher_entropy": h / among,
        "credit/inert": float(inert),
        "credit/frac_referenced": referenced / max(rows, 1),
    }
