"""Token weights of a batch in verl's layout: responses [B, R], padded right, with a mask of the policy's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from sgcd_kernels.core.segments import runs_of
from sgcd_kernels.core.validation import check_choice
from sgcd_kernels.credit.config import DEFAULT, CreditConfig
from sgcd_kernels.credit.rules import Credit
from sgcd_kernels.credit.summary import credit_summary, credit_sums
from sgcd_kernels.credit.weights import credit_weights


def credit_config(options: Mapping[str, object] | None) -> CreditConfig:
    """A `CreditConfig` from a section of a verl config, such as {"gamma": 1.0, "clip": 2.0}.

    Raises ValueError for a key that is not a field (naming the nearest), and for an invalid value.
    """
    given = dict(options or {})
    for name in given:
        check_choice("fused_kernel_options.sgcd", str(name), [field.name for field in fields(CreditConfig)])
    return CreditConfig(**given)  # type: ignore[arg-type]  # checked by CreditConfig


@torch.no_grad()
def response_credit(
    signals: Mapping[str, Tensor],  # each [B, R], by the names of `DivergenceStats`
    response_mask: Tensor,  # [B, R]; true at the policy's tokens, false at tool outputs and padding
    *,
    advantages: Tensor | None = None,  # [B, R]
    turn_ids: Tensor | None = None,  # [B, R]
    config: CreditConfig = DEFAULT,
) -> Credit:
    """`credit_weights` of every response; results [B, R], W = 1 outside the mask.

    Without `turn_ids` a turn is a run of the mask: no span crosses a tool's output. The signals reverse_kl and
    teacher_entropy are required, others if the rule reads them (`sgcd_kernels.credit.rules.RULES`).

    Raises ValueError as `credit_weights` does.
    """
    rows, width = response_mask.shape
    mask = (response_mask != 0).reshape(-1)
    given = dict(signals)
    if "teacher_logp" in signals and "student_logp" in signals:
        given["log_ratio"] = signals["teacher_logp"] - signals["student_logp"]
    flat = {name: x.reshape(-1) for name, x in given.items()}
    credit = credit_weights(
        flat["reverse_kl"],
        flat["teacher_entropy"],
        torch.arange(rows + 1, device=mask.device) * width,
        mask=mask,
        turn_ids=runs_of(mask) if turn_ids is None else turn_ids.reshape(-1),
        advantages=None if advantages is None else advantages.reshape(-1),
        log_ratio=flat.get("log_ratio"),
        forward_kl=flat.get("forward_kl"),
        bhattacharyya=flat.get("bhattacharyya"),
        student_entropy=flat.get("student_entropy"),
        config=config,
    )
    return Credit(*(x.reshape(rows, width) for x in credit))


def credit_metrics(
    credit: Credit, signals: Mapping[str, Tensor], response_mask: Tensor, config: CreditConfig
) -> dict[str, float]:
    """The metrics `credit/*` of `sgcd_loss`, over the policy's tokens."""
    sums = credit_sums(credit, signals["reverse_kl"], signals["teacher_entropy"], response_mask != 0, config.clip)
    return {name: float(value) for name, value in credit_summary(sums).items()}
