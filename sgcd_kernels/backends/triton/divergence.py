"""Divergences of two heads over one vocabulary: one pass over both, and one more for what needs both normalisers.

A program takes one tile of tokens and one vocab split. It makes both heads' logits tile by tile and keeps running
statistics of them in registers until they are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgcd_kernels.backends.protocol import DivergenceOptions
from sgcd_kernels.backends.triton import launch, topk
from sgcd_kernels.backends.triton.tiles import (
    INFINITY,
    LOG2_E,
    LOWEST,
    HeadPlaces,
    any_nan,
    any_target,
    exp_ftz,
    grouped_order,
    load_temperature,
    mixture_ratios,
    own_targets,
    pair_logits,
    pair_rows,
    rescaled,
    store_statistic,
    target_logits,
)
from sgcd_kernels.core.lm_head import Projection, sum_over
from sgcd_kernels.core.statistics import MixtureSums, PairStats


def divergence_forward(
    student: Projection, teacher: Projection, targets: Tensor, options: DivergenceOptions
) -> dict[str, Tensor]:
    if options.top_k is None:
        stats = _merged_stats(student, teacher, targets)
        fields = stats.results()
    else:
        stats, buckets = _with_top_k(student, teacher, targets, options.top_k)
        fields = stats.results() | buckets
    if options.features:
        sums = mixture_stats(student, teacher, stats.normalisers(), options.beta, "jsd" in options.features).sum(0)
        tv, jsd, mixture_kl = sum_over(sums, student.head.group)
        fields |= MixtureSums(jsd, tv, mixture_kl).results(options.features)
    return fields


def _merged_stats(student: Projection, teacher: Projection, targets: Tensor, peaks: Tensor | None = None) -> PairStats:
    splits = PairStats.of_splits(pair_stats(student, teacher, student.local_targets(targets), peaks))
    return splits.merged(student.head.group)


def _with_top_k(
    student: Projection, teacher: Projection, targets: Tensor, top_k: int
) -> tuple[PairStats, dict[str, Tensor]]:
    """Also the KLs over the buckets. Tokens go in chunks, which bounds what the top K takes."""
    parts, buckets = [], []
    block_v = topk.pair_block_v(student, teacher)
    for at in topk.token_chunks(student, top_k, block_v):
        p, q, y = student[at], teacher[at], targets[at]
        peaks = topk.empty_peaks(p, block_v)
        parts.append(_merged_stats(p, q, y, peaks))
        buckets.append(topk.bucket_divergences(p, q, y, parts[-1], peaks, top_k))
    return PairStats.concatenated(parts), {name: torch.cat([x[name] for x in buckets]) for name in buckets[0]}


def pair_stats(
    student: Projection,
    teacher: Projection,
    targets: Tensor,  # [n], rows of this rank's weight
    peaks: Tensor | None = None,  # [5, vocab tiles, n], written
) -> Tensor:  # [splits, 11, n]
    """m, rest, s and the target's logit of p, of q, then a_p, a_q and the overlap, of each vocab split."""
    head, other = launch.Head.of(student), launch.Head.of(teacher)
    config = launch.pair_config(student, head, other, has_epilogue=peaks is not None)
    sizes = launch.forward_sizes(student, config, head, other)
    out = student.hidden.new_empty((sizes.num_splits, 11, sizes.n), dtype=torch.float32)
    launch.variant(pair_stats_kernel, head, other)[sizes.grid](
        **launch.pair_places(head, other), rows=student.rows, transform=launch.transform(student, head, other),
        targets=targets, out=out, peaks=peaks, **sizes._asdict(),
        META=launch.meta(config, sizes.vocab, head, other), **launch.options(config),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=launch.SIZES)
def pair_stats_kernel(
    hidden, hidden_stride, weight, weight_stride, width,
    teacher_hidden, teacher_hidden_stride, teacher_weight, teacher_weight_stride, teacher_width,
    rows, transform, targets, out, peaks,
    n, vocab, vocab_per_split, token_tiles, num_splits, group_n, META: tl.constexpr,
):  # fmt: skip
    """out[split] = m, rest, s, target logit of the student, of the teacher, then a_p, a_q, overlap.

    peaks[5, vocab tiles, n] are each tile's largest logit of the teacher, and of both heads the running maximum and the
    logarithm of the tile's mass relative to it: see `topk`.
    """
    student = HeadPlaces(hidden, hidden_stride, weight, weight_stride, width)
    teacher = HeadPlaces(teacher_hidden, teacher_hidden_stride, teacher_weight, teacher_weight_stride, teacher_width)
    tile, split = grouped_order(token_tiles, num_splits, group_n)
    BLOCK_N: tl.constexpr = META.BLOCK_N
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_p, x_q = pair_rows(student, teacher, rows, tile, n, META)
    target = own_targets(targets, token, n, vocab)
    temperature = load_temperature(transform, token, n)
    lowest, zeros = tl.full((BLOCK_N,), LOWEST, tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    m_p, m_q = lowest, lowest
    rest_p, s_p, target_p = zeros - 1.0, zeros, zeros
    rest_q, s_q, target_q = zeros - 1.0, zeros, zeros
    a_p, a_q, overlap = zeros, zeros, zeros
    first = split * vocab_per_split
    stop = tl.minimum(first + vocab_per_split, vocab)
    for first_id in tl.range(first, stop, META.BLOCK_V, flatten=META.FLATTEN):
        vocab_ids = first_id + tl.arange(0, META.BLOCK_V)
        z_p, z_q = pair_logits(x_p, x_q, student, teacher, vocab_ids, vocab, transform, temperature, META)
        if any_target(target, first_id, META.BLOCK_V):
            target_p += target_logits(z_p, vocab_ids, target)
            target_q += target_logits(z_q, vocab_ids, target)
        new_m_p, new_m_q = tl.maximum(m_p, tl.max(z_p, 1)), tl.maximum(m_q, tl.max(z_q, 1))
        rest_p, s_p, shift_p = rescaled(m_p, rest_p, s_p, new_m_p)
        rest_q, s_q, shift_q = rescaled(m_q, rest_q, s_q, new_m_q)
        # Mass that underflows takes an infinite difference with it: 0 times inf would be NaN.
        a_p = tl.where(exp_ftz(shift_p) > 0, a_p * exp_ftz(shift_p), 0.0)
        a_q = tl.where(exp_ftz(shift_q) > 0, a_q * exp_ftz(shift_q), 0.0)
        overlap *= exp_ftz((shift_p + shift_q) * 0.5)
        m_p, m_q = new_m_p, new_m_q
        of_p, of_q, tile_overlap = sum_tile(z_p, z_q, m_p, m_q, META.GUARDED)
        if not META.GUARDED:  # noqa: SIM102  # a constant: what is left out is not compiled
            if any_nan(of_p[1] + of_p[2] + of_q[1] + of_q[2]):
                of_p, of_q, tile_overlap = sum_tile(z_p, z_q, m_p, m_q, True)
        if peaks is not None:
            at = peaks + first_id // META.BLOCK_V * n + token
            apart = (vocab + META.BLOCK_V - 1) // META.BLOCK_V * n
            tl.store(at, tl.max(z_q, 1), mask=token < n)
            tl.store(at + apart, m_p, mask=token < n)
            tl.store(at + 2 * apart, tl.log(of_p[0]), mask=token < n)
            tl.store(at + 3 * apart, m_q, mask=token < n)
            tl.store(at + 4 * apart, tl.log(of_q[0]), mask=token < n)
        rest_p += of_p[0]
        s_p += of_p[1]
        a_p += of_p[2]
        rest_q += of_q[0]
        s_q += of_q[1]
        a_q += of_q[2]
        overlap += tile_overlap
    store_statistic(out, split, 0, token, m_p, n, 11)
    store_statistic(out, split, 1, token, rest_p, n, 11)
    store_statistic(out, split, 2, token, s_p, n, 11)
    store_statistic(out, split, 3, token, target_p, n, 11)
    store_statistic(out, split, 4, token, m_q, n, 11)
    store_statistic(out, split, 5, token, rest_q, n, 11)
    store_statistic(out, split, 6, token, s_q, n, 11)
    store_statistic(out, split, 7, token, target_q, n, 11)
    store_statistic(out, split, 8, token, a_p, n, 11)
    store_statistic(out, split, 9, token, a_q, n, 11)
    store_statistic(out, split, 10, token, overlap, n, 11)


@triton.jit
def sum_tile(z_p, z_q, m_p, m_q, GUARD: tl.constexpr):
    """(l, s and a of the student, of the teacher, the overlap) of one tile around given maxima."""
    finite_p, finite_q = z_p, z_q
    if GUARD:
        finite_p, finite_q = tl.where(z_p == -INFINITY, LOWEST, z_p), tl.where(z_q == -INFINITY, LOWEST, z_q)
    centred_p, centred_q, delta_p, delta_q = (
        finite_p - m_p[:, None],
        finite_q - m_q[:, None],
        finite_p - z_q,
        z_p - finite_q,
    )
    # Of the roots: their squares are the exponentials, their product is the overlap, and nothing underflows sooner than
    # it must.
    root_p, root_q = tl.exp2(centred_p * (0.5 * LOG2_E)), tl.exp2(centred_q * (0.5 * LOG2_E))
    e_p, e_q = root_p * root_p, root_q * root_q
    if GUARD:
        centred_p, delta_p = tl.where(e_p > 0, centred_p, 0.0), tl.where(e_p > 0, delta_p, 0.0)
        centred_q, delta_q = tl.where(e_q > 0, centred_q, 0.0), tl.where(e_q > 0, delta_q, 0.0)
    of_p = tl.sum(e_p, 1), tl.sum(e_p * centred_p, 1), tl.sum(e_p * delta_p, 1)
    of_q = tl.sum(e_q, 1), tl.sum(e_q * centred_q, 1), tl.sum(e_q * delta_q, 1)
    return of_p, of_q, tl.sum(root_p * root_q, 1)


def mixture_stats(
    student: Projection,
    teacher: Projection,
    normalisers: Tensor,  # [4, n]
    beta: float,
    jsd: bool,
) -> Tensor:  # [splits, 3, n]
    """tv, jsd and sum p ln(p / m) of each vocab split, the last two only if `jsd`."""
    head, other = launch.Head.of(student), launch.Head.of(teacher)
    config = launch.config_of("mixture_stats", student, head, other)
    sizes = launch.forward_sizes(student, config, head, other)
    out = student.hidden.new_empty((sizes.num_splits, 3, sizes.n), dtype=torch.float32)
    launch.variant(mixture_stats_kernel, head, other)[sizes.grid](
        **launch.pair_places(head, other), rows=student.rows, transform=launch.transform(student, head, other),
        normalisers=normalisers, beta=beta, out=out, **sizes._asdict(), JSD=jsd,
        META=launch.meta(config, sizes.vocab, head, other), **launch.options(config),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=launch.SIZES)
def mixture_stats_kernel(
    hidden, hidden_stride, weight, weight_stride, width,
    teacher_hidden, teacher_hidden_stride, teacher_weight, teacher_weight_stride, teacher_width,
    rows, transform, normalisers, beta, out,
    n, vocab, vocab_per_split, token_tiles, num_splits, group_n, JSD: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """out[split] = tv, jsd, sum p ln(p / m), given normalisers[4, n]: m and ln l of the student, then the teacher."""
    student = HeadPlaces(hidden, hidden_stride, weight, weight_stride, width)
    teacher = HeadPlaces(teacher_hidden, teacher_hidden_stride, teacher_weight, teacher_weight_stride, teacher_width)
    tile, split = grouped_order(token_tiles, num_splits, group_n)
    BLOCK_N: tl.constexpr = META.BLOCK_N
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_p, x_q = pair_rows(student, teacher, rows, tile, n, META)
    temperature = load_temperature(transform, token, n)
    m_p = tl.load(normalisers + token, mask=token < n, other=0.0)
    log_l_p = tl.load(normalisers + n + token, mask=token < n, other=0.0)
    m_q = tl.load(normalisers + 2 * n + token, mask=token < n, other=0.0)
    log_l_q = tl.load(normalisers + 3 * n + token, mask=token < n, other=0.0)
    zeros = tl.zeros((BLOCK_N,), tl.float32)
    tv, jsd, mixture_kl = zeros, zeros, zeros
    first = split * vocab_per_split
    stop = tl.minimum(first + vocab_per_split, vocab)
    for first_id in tl.range(first, stop, META.BLOCK_V, flatten=META.FLATTEN):
        vocab_ids = first_id + tl.arange(0, META.BLOCK_V)
        z_p, z_q = pair_logits(x_p, x_q, student, teacher, vocab_ids, vocab, transform, temperature, META)
        # In two steps: at large logits one rounded normaliser would cost digits.
        log_p, log_q = z_p - m_p[:, None] - log_l_p[:, None], z_q - m_q[:, None] - log_l_q[:, None]
        p, q = exp_ftz(log_p), exp_ftz(log_q)
        tv += tl.sum(tl.abs(p - q), 1)
        if JSD:
            to_p, to_q = mixture_ratios(log_p, log_q, beta)
            mixture_kl += tl.sum(p * to_p, 1)
            jsd += tl.sum((1.0 - beta) * (p * to_p) + beta * (q * to_q), 1)
    store_statistic(out, split, 0, token, tv * 0.5, n, 3)
    store_statistic(out, split, 1, token, jsd, n, 3)
    store_statistic(out, split, 2, token, mixture_kl, n, 3)
