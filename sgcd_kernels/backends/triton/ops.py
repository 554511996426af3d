"""The backend's functions: what a `Projection` says, handed to the kernels.

What the kernels sum is finished, and merged over the ranks of a group, by the same classes as in the torch backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.kernel_inputs import (
    local_targets,
    mixture_fields,
    normalisers,
    values,
)
from sgcd_kernels.shard import sum_over
from sgcd_kernels.torch_backend import target_logp
from sgcd_kernels.torch_backend.grads import Needs
from sgcd_kernels.triton import launch, topk
from sgcd_kernels.triton.grads import walk
from sgcd_kernels.triton.partials import merged_head, merged_pair
from sgcd_kernels.types import Logprobs, Projection, ProjectionGrads

__all__ = ["distill_backward", "divergence_forward", "logprob_backward", "logprob_forward", "target_logp"]


def logprob_forward(
    p: Projection,
    targets: Tensor,  # [n]
    group: ProcessGroup | None = None,
    keep: Needs | None = None,  # nothing is kept: beside fast products, memory is slow
) -> Logprobs:
    """Of the computed rows."""
    stats = merged_head(launch.head_stats(p, local_targets(targets, p, group)))
    stats.merge(group)
    return Logprobs(*stats.results())


def logprob_backward(
    p: Projection,
    targets: Tensor,  # [n]
    lse: Tensor,  # [n]
    d_logp: Tensor,  # [n]
    needs: Needs,
    entropy: Tensor | None = None,  # [n], with d_entropy
    d_entropy: Tensor | None = None,  # [n]
    d_lse: Tensor | None = None,  # [n]
    group: ProcessGroup | None = None,
    kept: None = None,
) -> ProjectionGrads:
    """Gradients of sum(d_logp logp + d_entropy entropy + d_lse lse)."""
    if entropy is None or d_entropy is None:
        entropy = d_entropy = None
    scale = -d_logp if d_lse is None else d_lse - d_logp
    coefficients = [values(x) for x in (scale, d_logp, d_entropy) if x is not None]
    lift = lift_of(p, coefficients)
    scale, d_logp, *rest = (x * lift for x in coefficients) if lift is not None else coefficients
    grad = launch.LogprobGrad(
        local_targets(targets, p, group),
        values(lse),
        scale,
        d_logp,
        None if entropy is None else values(entropy),
        rest[0] if rest else None,
    )
    return walk(p, grad, needs, lift, group)


def divergence_forward(
    student: Projection,
    teacher: Projection,
    targets: Tensor,  # [n]
    features: tuple[str, ...],
    beta: float,
    top_k: int | None,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The asked-for fields of DivergenceStats, each [n]."""
    if top_k is None:
        stats = merged_pair(launch.pair_stats(student, teacher, local_targets(targets, student, group)))
        stats.merge(group)
        fields = stats.results()
    else:
        stats, buckets = topk.pair_stats(student, teacher, targets, top_k, group)
        fields = stats.results() | buckets
    if features:
        sums = launch.mixture_stats(student, teacher, normalisers(stats), beta, "jsd" in features).sum(0)
        tv, jsd, mixture_kl = sum_over(sums, group)
        fields |= mixture_fields(features, jsd, tv, mixture_kl)
    return fields


def distill_backward(
    student: Projection,
    teacher: Projection,
    kind: str,
    beta: float,
    lse: tuple[Tensor, Tensor],  # student's and teacher's, [n]
    centre: Tensor,  # [n], KL(p || q) for kind "reverse_kl", KL(p || m) for "jsd"
    d_loss: Tensor,  # [n]
    needs: Needs,
    group: ProcessGroup | None = None,
) -> ProjectionGrads:
    """Gradients of sum(d_loss divergence)."""
    lift = lift_of(student, [values(d_loss)])
    d_loss = values(d_loss) if lift is None else values(d_loss) * lift
    grad = launch.DistillGrad(teacher, kind, beta, values(lse[0]), values(lse[1]), values(centre), d_loss)
    return walk(student, grad, needs, lift, group)


LIFTED = 64.0  # where the largest coefficient of an fp16 gradient comes to lie: far from 65,504, far from 6e-8


def lift_of(p: Projection, coefficients: list[Tensor]) -> Tensor | None:
    """A power of two that keeps gradients of logits from underflowing in fp16; None for other operands."""
    if launch.operand_dtype(p) != torch.float16 or p.num_rows == 0:
        return None
    largest = torch.stack([x.abs().amax() for x in coefficients]).amax()
    return torch.where(largest > 0, LIFTED / largest, 1.0).log2().floor().exp2()
