"""sgcd::credit_weights, which has no gradient. A config travels as its fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sgcd_kernels.credit_config import CreditConfig
from sgcd_kernels.registered.library import register
from sgcd_kernels.types import Credit

NUMBERS = tuple(field.name for field in fields(CreditConfig) if field.type == "float")


def as_arguments(config: CreditConfig) -> tuple[str, str, int, int, list[float]]:
    seed = config.seed % (1 << 63)  # an op's integers have 64 bits, and the rules use the seed modulo this
    return config.rule, config.span_value, config.patience, seed, [float(getattr(config, name)) for name in NUMBERS]


def register_credit(compute: Callable[..., Credit]) -> Callable[..., Any]:
    """The op around `compute`, whose arguments are those of the public function."""

    def credit_weights(
        divergence: Tensor,  # [N]
        teacher_entropy: Tensor | None,  # [N]
        cu_seqlens: Tensor,  # [B + 1]
        mask: Tensor | None,  # [N]
        turn_ids: Tensor | None,  # [N]
        advantages: Tensor | None,  # [N] or [B]
        log_ratio: Tensor | None,  # [N]
        forward_kl: Tensor | None,  # [N]
        bhattacharyya: Tensor | None,  # [N]
        student_entropy: Tensor | None,  # [N]
        rule: str,
        span_value: str,
        patience: int,
        seed: int,
        numbers: list[float],  # the fields NUMBERS
    ) -> tuple[Tensor, Tensor, Tensor]:
        words = {"rule": rule, "span_value": span_value, "patience": patience, "seed": seed}
        values: dict[str, Any] = {**words, **dict(zip(NUMBERS, numbers, strict=True))}
        credit = compute(
            divergence,
            teacher_entropy,
            cu_seqlens,
            mask=mask,
            turn_ids=turn_ids,
            advantages=advantages,
            log_ratio=log_ratio,
            forward_kl=forward_kl,
            bhattacharyya=bhattacharyya,
            student_entropy=student_entropy,
            config=CreditConfig(**values),
        )
        return credit.weights, credit.saliency, credit.span_ids

    return register(credit_weights, _fake)


def _fake(divergence: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(divergence.dtype, torch.float32)
    weights, saliency = (divergence.new_empty(divergence.shape, dtype=dtype) for _ in range(2))
    return weights, saliency, divergence.new_empty(divergence.shape, dtype=torch.long)
