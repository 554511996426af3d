"""The backend's functions: what a `Projection` says, handed to the operators of csrc/.

What the operators sum is finished, and merged over the ranks of a group, by the same classes as in the torch backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.kernel_inputs import (
    local_targets,
    mixture_fields,
    normalisers,
    part_of,
    temperatures,
    values,
)
from sgcd_kernels.shard import sum_over
from sgcd_kernels.torch_backend import target_logp
from sgcd_kernels.torch_backend.divergence import PairStats
from sgcd_kernels.torch_backend.grads import Needs, saved_dtype
from sgcd_kernels.torch_backend.logprob import RowStats
from sgcd_kernels.torch_backend.topk import TeacherTopK
from sgcd_kernels.types import Logprobs, Projection, ProjectionGrads

__all__ = ["distill_backward", "divergence_forward", "logprob_backward", "logprob_forward", "target_logp"]

MAX_LISTED = 1 << 19  # words of all tokens' top-K lists at one time: some 6 MB, and as much again a few times over
KINDS = ("reverse_kl", "forward_kl", "jsd")  # by the numbers that csrc/tile_kernels.h gives them


def logprob_forward(
    p: Projection,
    targets: Tensor,  # [n]
    group: ProcessGroup | None = None,
    keep: Needs | None = None,
) -> Logprobs:
    """Of the computed rows. With `keep` tiles are kept, as far as there is room, for a backward pass of those needs."""
    arguments = *_head(p), p.rows, local_targets(targets, p, group), *_shared(p)
    kept = None
    if keep is None:
        raw = torch.ops.sgcd_kernels.head_stats(*arguments)
    else:
        raw, kept = torch.ops.sgcd_kernels.head_stats_cached(*arguments, keep[1])
    stats = RowStats(p.num_rows, raw)
    _fill(stats, raw)
    stats.merge(group)
    return Logprobs(*stats.results(), kept)


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
    kept: list[Tensor] | None = None,  # of `logprob_forward`; used up, and not with d_entropy
) -> ProjectionGrads:
    """Gradients of sum(d_logp logp + d_entropy entropy + d_lse lse)."""
    if entropy is None or d_entropy is None:
        entropy = d_entropy = None
    grads = torch.ops.sgcd_kernels.logprob_grads(
        *_head(p),
        p.rows,
        local_targets(targets, p, group),
        *_shared(p),
        values(lse),
        values(-d_logp if d_lse is None else d_lse - d_logp),
        values(d_logp),
        None if entropy is None else values(entropy),
        None if d_entropy is None else values(d_entropy),
        _wanted(p, needs),
        group is not None,
        kept or [],
    )
    return _grads(p, needs, grads, group)


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
    n = student.num_rows
    if top_k is not None and n > (step := max(64, MAX_LISTED // top_k)):
        cuts = [slice(start, start + step) for start in range(0, n, step)]
        parts = [
            divergence_forward(part_of(student, cut), part_of(teacher, cut), targets[cut], features, beta, top_k)
            for cut in cuts
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    best: dict[str, Tensor] = {}
    if top_k is None:
        stats = _pair_stats(student, teacher, local_targets(targets, student, group))
        stats.merge(group)
    else:
        stats, best = _pair_topk(student, teacher, targets, top_k)
    fields = stats.results() | best
    if features:
        asked = "jsd" in features, "tv" in features
        fields |= mixture_fields(features, *_mixture_sums(student, teacher, normalisers(stats), beta, *asked))
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
) -> ProjectionGrads:
    """Gradients of sum(d_loss divergence)."""
    grads = torch.ops.sgcd_kernels.distill_grads(
        *_pair(student, teacher),
        *_shared(student),
        values(lse[0]),
        values(lse[1]),
        values(centre),
        values(d_loss),
        beta,
        KINDS.index(kind),
        _wanted(student, needs),
    )
    return _grads(student, needs, grads, None)


def _pair(student: Projection, teacher: Projection) -> tuple[Tensor | None, ...]:
    return *_head(student), *_head(teacher), student.rows


def _pair_stats(student: Projection, teacher: Projection, targets: Tensor) -> PairStats:
    heads = _pair(student, teacher)
    return _filled(torch.ops.sgcd_kernels.pair_stats(*heads, targets, *_shared(student)))


def _pair_topk(
    student: Projection, teacher: Projection, targets: Tensor, top_k: int
) -> tuple[PairStats, dict[str, Tensor]]:
    heads = _pair(student, teacher)
    raw, logits, words = torch.ops.sgcd_kernels.pair_topk(*heads, targets, *_shared(student), top_k)
    stats, best = _filled(raw[:11]), TeacherTopK(top_k, targets)
    best.p, best.q, best.words = logits[0], logits[1], words
    tail_p, tail_q = (z / of.z * (m - of.m).exp() for (m, z), of in ((raw[11:13], stats.p), (raw[13:], stats.q)))
    return stats, best.results(stats.p, stats.q, tail_p, tail_q)


def _filled(raw: Tensor) -> PairStats:  # [11, n]
    stats = PairStats(raw.shape[1], raw)
    _fill(stats.p, raw[:4])
    _fill(stats.q, raw[4:8])
    stats.a_p, stats.a_q, stats.overlap = raw[8:].unbind(0)
    return stats


def _fill(stats: RowStats, raw: Tensor) -> None:
    stats.m, stats.z, stats.s, stats.target = raw.unbind(0)


def _mixture_sums(
    student: Projection, teacher: Projection, known: Tensor, beta: float, jsd: bool, tv: bool
) -> tuple[Tensor, ...]:
    heads = _pair(student, teacher)
    sums: Tensor = torch.ops.sgcd_kernels.mixture_stats(*heads, known, *_shared(student), beta, jsd, tv)
    return sums.unbind(0)


def _head(p: Projection) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden = p.hidden.detach()
    if hidden.stride(1) != 1 or (hidden.shape[0] > 1 and hidden.stride(0) < hidden.shape[1]):
        hidden = hidden.clone(memory_format=torch.contiguous_format)  # contiguous() leaves an empty one as it is
    return hidden, p.weight.detach(), None if p.bias is None else values(p.bias)


def _shared(p: Projection) -> tuple[Tensor | None, float]:
    """Temperatures and softcap."""
    return temperatures(p), p.softcap or 0.0


def _wanted(p: Projection, needs: Needs) -> list[bool]:
    return [needs[0], needs[1], needs[2] and p.bias is not None]


def _grads(
    p: Projection, needs: Needs, grads: tuple[Tensor, Tensor, Tensor], group: ProcessGroup | None
) -> ProjectionGrads:
    """Put the rows' gradient at their tokens, summed over the ranks."""
    wanted = _wanted(p, needs)
    hidden, weight, bias = (g if w else None for g, w in zip(grads, wanted, strict=True))
    if hidden is not None:
        hidden = sum_over(hidden, group).to(saved_dtype(p.hidden))
        if p.rows is not None:
            hidden = hidden.new_zeros(p.hidden.shape).index_copy_(0, p.rows, hidden)
    return ProjectionGrads(hidden, weight, bias)
