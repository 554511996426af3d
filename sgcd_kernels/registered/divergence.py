"""sgcd::linear_divergence, which has no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sgcd_kernels.backends import no_autocast, resolve
from sgcd_kernels.registered.heads import head, on_targets, place, stats_dtype
from sgcd_kernels.registered.library import register
from sgcd_kernels.shard import group_of, shard_range
from sgcd_kernels.types import DivergenceStats
from sgcd_kernels.validation import check_int


def asked_fields(jsd: bool, tv: bool, top_k: int | None) -> list[str]:
    """The fields of DivergenceStats that a call gives, in their order."""
    left_out = {"jsd": not jsd, "tv": not tv, "topk_reverse_kl": top_k is None, "topk_forward_kl": top_k is None}
    return [name for name in DivergenceStats._fields if not left_out.get(name, False)]


def linear_divergence(
    student_hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    teacher_hidden: Tensor,  # [N, H'] or [B, T, H']
    teacher_weight: Tensor | None,  # [V, H']; None is the student's
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    temperatures: Tensor | None,  # instead of `temperature`: one, or one a token
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    jsd: bool,
    tv: bool,
    beta: float,
    top_k: int | None,
    impl: str,
    group: str,
) -> list[Tensor]:
    """The fields that are asked for, each like `targets`."""
    ranks = group_of(group)
    student = head(student_hidden, weight, bias, temperatures, temperature, softcap, None)
    student, flat = on_targets(student, targets, ignore_index, ranks)
    teacher_weight = weight if teacher_weight is None else teacher_weight
    teacher = head(teacher_hidden, teacher_weight, teacher_bias, temperatures, temperature, softcap, student.rows)
    if ranks is not None and top_k is not None:
        check_int("top_k", top_k, 1, shard_range(weight, ranks)[1])
    features = tuple(name for name, asked in (("jsd", jsd), ("tv", tv)) if asked)
    with no_autocast(student_hidden.device):
        sharded = "sharded_" if ranks is not None and (features or top_k is not None) else ""
        forward = resolve(f"{sharded}divergence_forward", impl, student, teacher)
        fields = forward(student, teacher, flat, features, beta, top_k, ranks)
    return [place(fields[name], student.rows, targets.shape) for name in asked_fields(jsd, tv, top_k)]


def _fake(
    student_hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    *others: Any,
) -> list[Tensor]:
    *_, jsd, tv, _, top_k, _, _ = others
    dtype = stats_dtype(student_hidden, weight, teacher_hidden, weight if teacher_weight is None else teacher_weight)
    return [targets.new_empty(targets.shape, dtype=dtype) for _ in asked_fields(jsd, tv, top_k)]


op: Callable[..., Any] = register(linear_divergence, _fake)
