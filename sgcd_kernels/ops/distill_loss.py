"""A differentiable divergence from a student to a frozen teacher: the direct self-distillation baseline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.backends.protocol import IMPLS, DistillSaved, DivergenceOptions
from sgcd_kernels.backends.registry import backend_for, no_autocast
from sgcd_kernels.core.lm_head import HeadGrads, LMHead, Needs, Projection, empty_grads, stats_dtype
from sgcd_kernels.core.registration import register, restore, save
from sgcd_kernels.core.validation import (
    FLAGS,
    check_beside,
    check_beta,
    check_choice,
    check_pair,
    check_per_token,
    checked_head,
)
from sgcd_kernels.ops.divergence import teacher_head

KINDS = ("reverse_kl", "forward_kl", "jsd")
REDUCTIONS = ("none", "mean", "sum")


def linear_distill_loss(
    student_hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    teacher_hidden: Tensor,  # [N, H'] or [B, T, H']
    teacher_weight: Tensor | None = None,  # [V, H']
    *,
    mask: Tensor | None = None,  # [N] or [B, T]; true where a token has a loss
    kind: str = "reverse_kl",
    beta: float = 0.5,
    reduction: str = "mean",
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or per token
    softcap: float | None = None,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """KL(p || q) ("reverse_kl"), KL(q || p) ("forward_kl") or JSD_beta ("jsd", GKD, arXiv 2306.13649), p the student.

    Differentiable in the student's hidden, weight and bias. The teacher gets no gradient, even if it uses the student's
    weight. Temperature applies once to both, without a factor T^2. reduction="none" returns one value per token (fp32,
    0 where masked); "mean" averages over the unmasked tokens (0 if there are none). Teacher head, softcap and
    non-finite inputs are as in `linear_divergence`. A jsd needs beta in [1e-6, 1 - 1e-6]; other kinds ignore it.

    A token at which reverse_kl is +inf, because the teacher forbids what the student may say, has the gradient 0: the
    formula would be inf - inf. That of an infinite forward_kl is p - q, as everywhere.

    Gradients: student_hidden, weight, bias
    Backends: triton, cpp, torch
    Cost: 2 U forward, 4 U backward; for kind "jsd" 4 U forward, 4 U backward

    `group`: both weights (and biases) are this rank's rows of vocab-sharded heads; every rank gets the full loss, and
    the hidden gradient is summed over the ranks.

    Raises ValueError for shapes, dtypes, devices or options that do not fit.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> student, teacher, weight = (torch.randn(n, 4, generator=g) for n in (3, 3, 10))
    >>> student.requires_grad_() is student
    True
    >>> mask = torch.tensor([True, True, False])
    >>> each = linear_distill_loss(student, weight, teacher, mask=mask, kind="jsd", reduction="none")
    >>> each.shape, each[2].item()
    (torch.Size([3]), 0.0)
    >>> each.sum().backward()
    >>> student.grad[2].tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_beta(beta, kind == "jsd")
    check_choice("impl", impl, IMPLS)
    head = LMHead(weight, bias, softcap, temperature, group)
    teacher = teacher_head(head, teacher_weight, teacher_bias)
    leading = check_pair(student_hidden, head, teacher_hidden, teacher)
    check_beside("beta", beta, "student_hidden", student_hidden)
    check_per_token("mask", mask, leading, student_hidden.device, FLAGS)
    head, teacher = head.with_constant_temperature(), teacher.with_constant_temperature()
    teacher = replace(teacher, weight=teacher.weight.detach(), bias=_detached(teacher.bias))
    inputs = _Inputs(student_hidden, head, teacher_hidden.detach(), teacher, mask)
    return distill_op(inputs, _Options(kind, beta, reduction, impl)).loss


class _Inputs(NamedTuple):
    hidden: Tensor  # [N, H] or [B, T, H]
    head: LMHead
    teacher_hidden: Tensor  # [N, H'] or [B, T, H']
    teacher: LMHead
    mask: Tensor | None

    def projections(self) -> tuple[Projection, Projection]:
        student = Projection.of(self.hidden, checked_head(self.head))
        if self.mask is not None:
            student = student.on(self.mask.reshape(-1) != 0)
        return student, Projection.of(self.teacher_hidden, checked_head(self.teacher), student.rows)

    def stats_dtype(self) -> torch.dtype:
        return stats_dtype(self.hidden, self.head.weight, self.teacher_hidden, self.teacher.weight)


class _Options(NamedTuple):
    kind: str
    beta: float
    reduction: str
    impl: str


class _Result(NamedTuple):
    loss: Tensor  # a scalar, or like mask
    saved: DistillSaved  # like mask


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _fake(inputs: _Inputs, options: _Options) -> _Result:
    hidden, dtype = inputs.hidden, inputs.stats_dtype()
    leading = hidden.shape[:-1]
    saved = DistillSaved(*(hidden.new_empty(leading, dtype=dtype) for _ in DistillSaved._fields))
    return _Result(hidden.new_empty(leading if options.reduction == "none" else (), dtype=dtype), saved)


def _setup(ctx: Any, result: _Result, inputs: _Inputs, options: _Options) -> None:
    # Save all tensors, the teacher's too: autograd then detects changes in place before backward, and may offload them.
    save(ctx, inputs=inputs, saved=result.saved, options=options)


def _backward(ctx: Any, upstream: _Result) -> dict[str, Tensor | None]:
    at = restore(ctx)
    needs = Needs(*(ctx.needs[f"inputs_{name}"] for name in ("hidden", "head_weight", "head_bias")))
    grads = distill_backward_op(at.inputs, at.options, at.saved, upstream.loss, needs)
    return {"inputs_hidden": grads.hidden, "inputs_head_weight": grads.weight, "inputs_head_bias": grads.bias}


@register(_fake, _setup, _backward, differentiable=("loss",))
def distill_op(inputs: _Inputs, options: _Options) -> _Result:
    kind, shape = options.kind, inputs.hidden.shape[:-1]
    check_beta(options.beta, kind == "jsd")
    student, teacher = inputs.projections()
    asked = DivergenceOptions(("jsd", "mixture_kl") if kind == "jsd" else (), options.beta)
    if inputs.head.group is not None:
        backend_for(options.impl, "distill_backward", student, teacher)  # refuse before the forward pass
    backend = backend_for(
        options.impl, "divergence_second_pass" if asked.features else "divergence_forward", student, teacher
    )
    if student.num_rows == 0:
        zeros = torch.zeros(shape, dtype=inputs.stats_dtype(), device=inputs.hidden.device)
        loss = zeros.clone() if options.reduction == "none" else zeros.sum()
        return _Result(loss, DistillSaved(*(zeros.clone() for _ in DistillSaved._fields)))
    unused = torch.zeros(student.num_rows, dtype=torch.long, device=inputs.hidden.device)
    with no_autocast(inputs.hidden.device):
        fields = backend.divergence_forward(student, teacher, unused, asked)
    values = fields[kind]
    fields["mean_log_ratio"] = fields["mixture_kl" if kind == "jsd" else kind]
    saved = DistillSaved(**{name: student.scatter(fields[name], shape) for name in DistillSaved._fields})
    if options.reduction == "none":
        return _Result(student.scatter(values, shape), saved)
    total = values.sum()
    return _Result(total if options.reduction == "sum" else total / values.numel(), saved)


def _fake_backward(
    inputs: _Inputs, options: _Options, saved: DistillSaved, upstream: Tensor, needs: Needs
) -> HeadGrads:
    return empty_grads(inputs.hidden, inputs.head, needs)


@register(_fake_backward)
def distill_backward_op(
    inputs: _Inputs, options: _Options, saved: DistillSaved, upstream: Tensor, needs: Needs
) -> HeadGrads:
    student, teacher = inputs.projections()
    rows = student.num_rows
    if options.reduction == "none":
        per_row = student.gather(upstream.reshape(-1))
    else:
        per_row = (upstream if options.reduction == "sum" else upstream / max(rows, 1)).expand(rows)
    of_rows = DistillSaved(*(student.gather(x.reshape(-1)) for x in saved))
    with no_autocast(inputs.hidden.device):
        backend = backend_for(options.impl, "distill_backward", student, teacher)
        grads = backend.distill_backward(student, teacher, (options.kind, options.beta), of_rows, per_row, needs)
    return grads.in_dtypes_of(inputs.hidden, inputs.head)
