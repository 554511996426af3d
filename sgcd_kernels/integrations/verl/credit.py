"""Token weights of a batch as verl holds it: padded responses [B, R], right-padded, a mask of what the policy wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from sgcd_kernels.core.validation import check_choice
from sgcd_kernels.credit.config import DEFAULT, CreditConfig
from sgcd_kernels.credit.rules import Credit
from sgcd_kernels.credit.weights import credit_weights

OPTIONAL = ("forward_kl", "bhattacharyya", "student_entropy")  # signals that `credit_weights` takes as they are


def credit_config(options: Mapping[str, object] | None) -> CreditConfig:
    """A `CreditConfig` from what stands in a verl config, e.g. {"gamma": 1.0, "clip": 2.0}.

    Raises ValueError for a key that is no field of it (naming the nearest), and for a value that does not fit.
    """
    given = dict(options or {})
    for name in given:
        check_choice("fused_kernel_options.sgcd", str(name), [field.name for field in fields(CreditConfig)])
    return CreditConfig(**given)  # type: ignore[arg-type]  # checked by CreditConfig


@torch.no_grad()
def response_credit(
    signals: Mapping[str, Tensor],  # each [B, R], named as the fields of `DivergenceStats`
    response_mask: Tensor,  # [B, R]; true where the policy wrote, false at tools' answers and padding
    *,
    advantages: Tensor | None = None,  # [B, R]
    turn_ids: Tensor | None = None,  # [B, R]
    config: CreditConfig = DEFAULT,
) -> Credit:
    """`credit_weights` of every response; results [B, R], W = 1 outside the mask.

    Without `turn_ids` a turn is a run of the mask: no span reaches past a tool's answer. Of the signals reverse_kl and
    teacher_entropy are needed, the others by the rules that read them (`sgcd_kernels.credit_rules.NEEDS`).

    Raises ValueError as `credit_weights` does.
    """
    rows, width = response_mask.shape
    mask = (response_mask != 0).reshape(-1)
    runs = (mask & ~mask.roll(1)).cumsum(0)
    given: dict[str, Tensor | None] = {name: signals.get(name) for name in OPTIONAL} | {"advantages": advantages}
    if "teacher_logp" in signals and "student_logp" in signals:
        given["log_ratio"] = signals["teacher_logp"] - signals["student_logp"]
    credit = credit_weights(
        signals["reverse_kl"].reshape(-1),
        signals["teacher_entropy"].reshape(-1),
        torch.arange(rows + 1, device=mask.device) * width,
        mask=mask,
        turn_ids=runs if turn_ids is None else turn_ids.reshape(-1),
        config=config,
        **{name: None if x is None else x.reshape(-1) for name, x in given.items()},
    )
    return Credit(*(x.reshape(rows, width) for x in credit))


def credit_metrics(credit: Credit, signals: Mapping[str, Tensor], response_mask: Tensor) -> dict[str, float]:
    """What the credit did over the policy's own tokens, under the names that `sgcd_loss` uses."""
    mask = response_mask != 0
    weights, saliency, divergence = (x[mask] for x in (credit.weights, credit.saliency, signals["reverse_kl"]))
    count = max(weights.numel(), 1)
    inert = weights.numel() > 0 and bool((divergence == 0).all() or (weights == 1).all())
    return {
        "credit/mean_divergence": float(divergence.sum() / count),
        "credit/mean_weight": float(weights.sum() / count) if weights.numel() else 1.0,
        "credit/frac_salient": float((saliency > 0).sum() / count),
        "credit/inert": float(inert),
    }
