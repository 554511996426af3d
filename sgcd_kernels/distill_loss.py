"""A differentiable divergence from a student to a frozen teacher: the direct self-distillation baseline."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.backends import IMPLS
from sgcd_kernels.divergence import bias_of_teacher, check_pair
from sgcd_kernels.registered import distill_loss as registered
from sgcd_kernels.shard import name_of
from sgcd_kernels.validation import check_choice, check_float, check_jsd_beta, detached, per_token, tempering

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
    temperature: float | Tensor = 1.0,  # or one a token
    softcap: float | None = None,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """KL(p || q) ("reverse_kl"), KL(q || p) ("forward_kl") or JSD_beta ("jsd", GKD, arXiv 2306.13649), p the student.

    Differentiable in the student's hidden, weight and bias; the teacher gets no gradient, also where it shares the
    student's weight. Temperature applies once to both and no T^2 factor is put in. reduction="none" gives one value a
    token (fp32, 0 where masked), "mean" divides by the unmasked tokens (0 if there are none). Teacher head, softcap and
    non-finite inputs are as in `linear_divergence`. A jsd needs beta in [1e-6, 1 - 1e-6]; the
    other kinds do not read it.

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
    check_float("beta", beta, 0.0, 1.0)
    if kind == "jsd":
        check_jsd_beta(beta)
    check_choice("impl", impl, IMPLS)
    leading = check_pair(
        student_hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, temperature, softcap
    )
    if mask is not None:
        per_token("mask", mask, leading, student_hidden.device)
    loss: Tensor = registered.op(
        student_hidden,
        weight,
        bias,
        teacher_hidden.detach(),
        detached(teacher_weight),
        detached(bias_of_teacher(bias, teacher_weight, teacher_bias)),
        mask,
        *tempering(temperature),
        None if softcap is None else float(softcap),
        kind,
        float(beta),
        reduction,
        impl,
        name_of(group),
    )[0]
    return loss
