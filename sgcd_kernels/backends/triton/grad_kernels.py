"""Gradients of logits: made again tile by tile, turned into their gradient in registers, and written in the operands'
dtype for the two library products that follow (`grads.py`).

`out` is [n, slice] with rows apart by `out_stride`; word 0 of it is word `first` of the weight.
"""

import triton
import triton.language as tl

from sgcd_kernels.triton.forward_kernels import VARYING, pair_rows, pair_tile
from sgcd_kernels.triton.tiles import exp, finish, hidden_rows, mixture_ratios, product, tile_of, unfinish, weight_rows

FLOOR = tl.constexpr(-1e4)  # e^FLOOR is 0, and 0 times it is 0 where 0 times -inf would be NaN


@triton.jit
def at_tokens(values, token, n, other: tl.constexpr):
    """One value a token, as a column."""
    return tl.load(values + token, mask=token < n, other=other)[:, None]


@triton.jit
def write(out, out_stride, dz, token, column, n, count, EVEN_V: tl.constexpr):
    at = out + token.to(tl.int64)[:, None] * out_stride + column[None, :]
    if EVEN_V:  # a mask along the row would make sixteen-byte stores two-byte ones
        tl.store(at, dz.to(out.dtype.element_ty), mask=(token < n)[:, None])
    else:
        tl.store(at, dz.to(out.dtype.element_ty), mask=(token < n)[:, None] & (column < count)[None, :])


@triton.jit(do_not_specialize=VARYING)
def logprob_grad_kernel(
    x, rows, x_stride, w, w_stride, bias, target, temperature, softcap, lse, scale, d_logp, entropy, d_entropy,
    out, out_stride, n, vocab, width, first, count, token_tiles, word_tiles, group,
    EVEN_H: tl.constexpr, EVEN_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """p (scale - d_entropy (ln p + entropy)), and d_logp more at the target."""
    tile, block = tile_of(token_tiles, word_tiles, group)
    token, column = tile * T + tl.arange(0, T), block * W + tl.arange(0, W)
    words, start = first + column, first + block * W
    t = None
    if temperature is not None:
        t = tl.load(temperature + token, mask=token < n, other=1.0)
    x_tile = hidden_rows(x, rows, token, n, x_stride)
    z = product(x_tile, weight_rows(w, words, vocab, w_stride), width, EVEN_H, OPERAND, PRECISION, T, W, K)
    z = finish(z, words, vocab, bias, softcap, t, EVEN_V)
    log_p = z - at_tokens(lse, token, n, 0.0)
    log_p = tl.where(log_p < FLOOR, FLOOR, log_p)  # not a maximum, which would lose a NaN
    slope = at_tokens(scale, token, n, 0.0)
    if d_entropy is not None:
        slope = slope - at_tokens(d_entropy, token, n, 0.0) * (log_p + at_tokens(entropy, token, n, 0.0))
    dz = exp(log_p) * slope
    y = tl.load(target + token, mask=token < n, other=-1)
    if tl.max(((y >= start) & (y < start + W)).to(tl.int32), 0) > 0:
        dz = tl.where(words[None, :] == y[:, None], dz + at_tokens(d_logp, token, n, 0.0), dz)
    write(out, out_stride, unfinish(dz, z, softcap, t), token, column, n, count, EVEN_V)


@triton.jit(do_not_specialize=VARYING)
def distill_grad_kernel(
    x, rows, x_stride, w, w_stride, bias, y, y_stride, v, v_stride, teacher_bias,
    temperature, softcap, lse, teacher_lse, centre, d_loss, beta,
    out, out_stride, n, vocab, width, teacher_width, first, count, token_tiles, word_tiles, group,
    KIND: tl.constexpr, SHARED: tl.constexpr, STACKED: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_G: tl.constexpr, EVEN_V: tl.constexpr,
    OPERAND: tl.constexpr, TEACHER_OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Of KL(p || q): p (ln p - ln q - KL). Of KL(q || p): p - q. Of JSD: (1 - beta) p (ln p/m - sum p ln p/m)."""
    tile, block = tile_of(token_tiles, word_tiles, group)
    token, column = tile * T + tl.arange(0, T), block * W + tl.arange(0, W)
    words = first + column
    t = None
    if temperature is not None:
        t = tl.load(temperature + token, mask=token < n, other=1.0)
    x_tile, y_tile = pair_rows(x, y, rows, tile, n, x_stride, y_stride, STACKED, T)
    z_p, z_q = pair_tile(
        x_tile, weight_rows(w, words, vocab, w_stride), y_tile, weight_rows(v, words, vocab, v_stride),
        words, vocab, width, teacher_width, bias, teacher_bias, softcap, t,
        SHARED, STACKED, EVEN_H, EVEN_G, EVEN_V, OPERAND, TEACHER_OPERAND, PRECISION, T, W, K,
    )  # fmt: skip
    log_p, log_q = z_p - at_tokens(lse, token, n, 0.0), z_q - at_tokens(teacher_lse, token, n, 0.0)
    p = exp(log_p)
    if KIND == "forward_kl":
        dz = p - exp(log_q)
    elif KIND == "reverse_kl":
        gap = tl.where(p > 0, log_p - log_q, 0.0)
        dz = (gap - at_tokens(centre, token, n, 0.0)) * p
    else:
        log_p = tl.where(log_p < FLOOR, FLOOR, log_p)
        to_p, _ = mixture_ratios(log_p, log_q, beta)
        dz = (to_p - at_tokens(centre, token, n, 0.0)) * p * (1.0 - beta)
    dz = dz * at_tokens(d_loss, token, n, 0.0)
    write(out, out_stride, unfinish(dz, z_p, softcap, t), token, column, n, count, EVEN_V)
