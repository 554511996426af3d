"""Gradient of a student-teacher divergence in the student's logits, made again tile by tile."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sgcd_kernels.backends.protocol import DistillSaved
from sgcd_kernels.backends.triton import launch
from sgcd_kernels.backends.triton.gradients import Write, loss_scale_of, sweep_gradients
from sgcd_kernels.backends.triton.tiles import (
    INFINITY,
    MIN_EXPONENT,
    HeadPlaces,
    exp_ftz,
    expm1f,
    grouped_order,
    load_column,
    load_temperature,
    minus_lse,
    mixture_ratios,
    pair_logits,
    pair_rows,
    store_logit_grad,
    transform_backward,
)
from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection, as_fp32


def distill_backward(
    student: Projection,
    teacher: Projection,
    divergence: tuple[str, float],
    saved: DistillSaved,
    upstream: Tensor,
    needs: Needs,
) -> HeadGrads:
    upstream = as_fp32(upstream)
    loss_scale = loss_scale_of(student, [upstream])
    if loss_scale is not None:
        upstream = upstream * loss_scale
    saved = DistillSaved(*map(as_fp32, saved))

    def writer(part: Projection, tokens: slice) -> Write:
        of_part = DistillSaved(*(v[tokens] for v in saved))
        return _logit_grad_writer(part, teacher[tokens], divergence, of_part, upstream[tokens])

    return sweep_gradients(student, needs, writer, loss_scale)


def _logit_grad_writer(
    student: Projection, teacher: Projection, divergence: tuple[str, float], saved: DistillSaved, upstream: Tensor
) -> Write:
    """What fills dZ of these tokens."""
    kind, beta = divergence
    head, other = launch.Head.of(student), launch.Head.of(teacher)
    config = launch.config_of("distill_grad", student, head, other, has_epilogue=kind == "jsd")
    kernel, transform = launch.variant(distill_grad_kernel, head, other), launch.transform(student, head, other)

    def write(first_id: int, out: Tensor) -> None:
        sizes = launch.chunk_sizes(student, first_id, out.shape[1], config, head, other)
        kernel[sizes.grid](
            **launch.pair_places(head, other), rows=student.rows, transform=transform, saved=saved, upstream=upstream,
            beta=beta, out=out, out_stride=out.stride(0), **sizes._asdict(), KIND=kind,
            META=launch.meta(config, sizes.chunk, head, other), **launch.options(config),
        )  # fmt: skip

    return write


@triton.jit(do_not_specialize=launch.SIZES)
def distill_grad_kernel(
    hidden, hidden_stride, weight, weight_stride, width,
    teacher_hidden, teacher_hidden_stride, teacher_weight, teacher_weight_stride, teacher_width,
    rows, transform, saved, upstream, beta, out, out_stride,
    n, vocab, first_id, chunk, token_tiles, vocab_tiles, group_n, KIND: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Of KL(p || q): p (ln p - ln q - KL). Of KL(q || p): p - q. Of JSD: (1 - beta) p (ln p/m - sum p ln p/m)."""
    student = HeadPlaces(hidden, hidden_stride, weight, weight_stride, width)
    teacher = HeadPlaces(teacher_hidden, teacher_hidden_stride, teacher_weight, teacher_weight_stride, teacher_width)
    tile, block = grouped_order(token_tiles, vocab_tiles, group_n)
    token, column = tile * META.BLOCK_N + tl.arange(0, META.BLOCK_N), block * META.BLOCK_V + tl.arange(0, META.BLOCK_V)
    vocab_ids = first_id + column
    temperature = load_temperature(transform, token, n)
    x_p, x_q = pair_rows(student, teacher, rows, tile, n, META)
    z_p, z_q = pair_logits(x_p, x_q, student, teacher, vocab_ids, vocab, transform, temperature, META)
    log_p = minus_lse(z_p, saved.student_lse, saved.student_lse_low, token, n)
    log_q = minus_lse(z_q, saved.teacher_lse, saved.teacher_lse_low, token, n)
    p = exp_ftz(log_p)
    if KIND == "forward_kl":
        # Where one of them is near 1, p - q would lose 1 - p and 1 - q.
        near_one = (log_p > -0.5) | (log_q > -0.5)
        dz = tl.where(near_one, expm1f(log_p) - expm1f(log_q), p - exp_ftz(log_q))
    elif KIND == "reverse_kl":
        log_ratio = tl.where(p > 0, log_p - log_q, 0.0)
        mean = load_column(saved.mean_log_ratio, token, n)
        dz = tl.where(mean == INFINITY, 0.0, (log_ratio - mean) * p)  # inf - inf is no gradient
    else:
        log_p = tl.where(log_p < MIN_EXPONENT, MIN_EXPONENT, log_p)
        to_p, _ = mixture_ratios(log_p, log_q, beta)
        dz = (to_p - load_column(saved.mean_log_ratio, token, n)) * p * (1.0 - beta)
    dz = transform_backward(dz * load_column(upstream, token, n), z_p, transform.softcap, temperature)
    store_logit_grad(out, out_stride, dz, token, column, n, chunk, META.DIVISIBLE_V)
