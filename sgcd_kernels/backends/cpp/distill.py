"""Gradient of a student-teacher divergence, by an operator of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.backends.cpp import arguments
from sgcd_kernels.backends.protocol import DistillSaved
from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection, as_fp32

KIND_NUMBERS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}  # as the operator numbers them


def distill_backward(
    student: Projection,
    teacher: Projection,
    divergence: tuple[str, float],
    saved: DistillSaved,
    upstream: Tensor,
    needs: Needs,
) -> HeadGrads:
    kind, beta = divergence
    grads = torch.ops.sgcd_kernels.distill_grads(
        *arguments.pair(student, teacher),
        *arguments.transform(student),
        *map(as_fp32, saved),
        as_fp32(upstream),
        beta,
        KIND_NUMBERS[kind],
        arguments.wanted(student, needs),
    )
    return arguments.head_grads(student, needs, grads)
