"""A differentiable divergence from a student to a frozen teacher: the direct self-distillation baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from sgcd_kernels.backends import eager, no_autocast, resolve
from sgcd_kernels.divergence import on_rows, projection_pair
from sgcd_kernels.logprob import as_input_dtypes
from sgcd_kernels.types import Projection
from sgcd_kernels.validation import check_choice, check_float, check_jsd_beta, kept_rows, per_token, scatter

KINDS = ("reverse_kl", "forward_kl", "jsd")
REDUCTIONS = ("none", "mean", "sum")


@eager
def linear_distill_loss(
    student_hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    teacher_hidden: Tensor,  # [N, H'] or [B, T, H']
    teacher_weight: Tensor | None = None,  # [V, H']
    *,
    mask: Tensor | None = None,  # [N] or [B, T]
    kind: str = "reverse_kl",
    beta: float = 0.5,
    reduction: str = "mean",
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """KL(p || q) ("reverse_kl"), KL(q || p) ("forward_kl") or JSD_beta ("jsd", GKD, arXiv 2306.13649), p the student.

    Differentiable in the student's hidden, weight and bias; the teacher gets no gradient, also where it shares the
    student's weight. Temperature applies once to both and no T^2 factor is put in. reduction="none" gives one value a
    token (fp32, 0 where masked), "mean" divides by the unmasked tokens (0 if there are none). Teacher head, softcap and
    non-finite inputs are as in `linear_divergence`. A jsd needs beta in
    [1e-6, 1 - 1e-6].

    Raises ValueError for shapes, dtypes, devices or options that do not fit, and for any `group`: vocab-parallel
    distillation is not supported.
    """
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_float("beta", beta, 0.0, 1.0)
    if kind == "jsd":
        check_jsd_beta(beta)
    if group is not None:
        raise ValueError("group is not supported by linear_distill_loss; needs None")
    student, teacher = projection_pair(
        student_hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, temperature, softcap
    )
    leading = student_hidden.shape[:-1]
    rows = None
    if mask is not None:
        rows = kept_rows(per_token("mask", mask, leading, student_hidden.device) != 0)
    teacher = on_rows(teacher, rows)
    inputs = (student.hidden, weight, bias, teacher, student, kind, beta, impl)
    values: Tensor = _LinearDistill.apply(*inputs)  # type: ignore[no-untyped-call]
    if reduction == "none":
        return scatter(values, rows, leading)
    return values.sum() if reduction == "sum" else values.sum() / max(values.numel(), 1)


class _LinearDistill(torch.autograd.Function):
    """Saves the inputs and three numbers a token; backward recomputes both heads' logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Projection,
        student: Projection,
        kind: str,
        beta: float,
        impl: str,
    ) -> Tensor:
        p = Projection(hidden, weight, bias, student.temperature, student.softcap, teacher.rows)
        features = ("jsd",) if kind == "jsd" else ()
        unused = torch.zeros(p.num_rows, dtype=torch.long, device=hidden.device)
        with no_autocast(hidden.device):
            fields = resolve("divergence_forward", impl, p, teacher)(p, teacher, unused, features, beta, None, None)
        value: Tensor = fields[kind]
        # All tensors, the teacher's too: autograd then notices one that changes before backward, and may offload them.
        temperature = student.temperature if isinstance(student.temperature, Tensor) else None
        frozen_side = (teacher.hidden, teacher.weight, teacher.bias, teacher.rows, temperature)
        statistics = (fields["student_lse"], fields["teacher_lse"], value)
        ctx.save_for_backward(hidden, weight, bias, *statistics, *frozen_side)
        ctx.scalars = (student.temperature if temperature is None else 1.0, student.softcap, kind, beta, impl)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_value: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, student_lse, teacher_lse, value, *frozen_side = ctx.saved_tensors
        teacher_hidden, teacher_weight, teacher_bias, rows, temperatures = frozen_side
        scalar, softcap, kind, beta, impl = ctx.scalars
        temperature = scalar if temperatures is None else temperatures
        p = Projection(hidden, weight, bias, temperature, softcap, rows)
        teacher = Projection(teacher_hidden, teacher_weight, teacher_bias, temperature, softcap, rows)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        with no_autocast(hidden.device):
            grads = resolve("distill_backward", impl, p, teacher)(
                p, teacher, kind, beta, (student_lse, teacher_lse), value, d_value, needs
            )
        return (*as_input_dtypes(grads, hidden, weight, bias), *(None,) * 5)
