"""Divergences of two heads over one vocabulary, by the operators of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.backends.cpp import arguments
from sgcd_kernels.backends.protocol import DivergenceOptions
from sgcd_kernels.core.lm_head import Projection
from sgcd_kernels.core.statistics import MixtureSums, PairStats, TeacherTopK

MAX_LISTED = 1 << 19  # entries of all rows' top-K lists at one time: 6 MB, plus a few temporaries as large


def divergence_forward(
    student: Projection, teacher: Projection, targets: Tensor, options: DivergenceOptions
) -> dict[str, Tensor]:
    n, top_k = student.num_rows, options.top_k
    if top_k is not None and n > (step := max(64, MAX_LISTED // top_k)):
        chunks = [slice(start, start + step) for start in range(0, n, step)]
        parts = [divergence_forward(student[at], teacher[at], targets[at], options) for at in chunks]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    buckets: dict[str, Tensor] = {}
    if top_k is None:
        inputs = *arguments.pair(student, teacher), student.local_targets(targets), *arguments.transform(student)
        stats = PairStats.of_fields(torch.ops.sgcd_kernels.pair_stats(*inputs)).merged(student.head.group)
    else:
        stats, buckets = _with_top_k(student, teacher, targets, top_k)
    fields = stats.results() | buckets
    if options.features:
        asked = options.beta, "jsd" in options.features, "tv" in options.features
        inputs = *arguments.pair(student, teacher), stats.normalisers(), *arguments.transform(student)
        jsd, tv, mixture_kl = torch.ops.sgcd_kernels.mixture_stats(*inputs, *asked)
        fields |= MixtureSums(jsd, tv, mixture_kl).results(options.features)
    return fields


def _with_top_k(
    student: Projection, teacher: Projection, targets: Tensor, top_k: int
) -> tuple[PairStats, dict[str, Tensor]]:
    inputs = *arguments.pair(student, teacher), targets, *arguments.transform(student)
    fields, logits, ids = torch.ops.sgcd_kernels.pair_topk(*inputs, top_k)
    stats, (m_p, rest_p, m_q, rest_q) = PairStats.of_fields(fields[:11]), fields[11:]  # the tail's m and rest
    tail_p = (rest_p + 1) / stats.p.l * (m_p - stats.p.m).exp()
    tail_q = (rest_q + 1) / stats.q.l * (m_q - stats.q.m).exp()
    return stats, TeacherTopK(q=logits[1], p=logits[0], ids=ids).results(stats, targets, tail_p, tail_q)
