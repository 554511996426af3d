"""Gradients of logits: made again tile by tile, turned into their gradient in registers, and written in the operands'
dtype for the two library products that follow (`grads.py`).

`out` is [n, slice] with rows apart by `out_stride`; word 0 of it is word `first` of the weight.
"""

import triton
import triton.language as tl

from sgcd_kernels.triton.forward_kernels import pair_tile
from sgcd_kernels.triton.tiles import finish, hidden_rows, mixture_ratios, product, unfinish, weight_rows

FLOOR = tl.constexpr(-1e4)  # e^FLOOR is 0, and 0 times it is 0 where 0 times -inf would be NaN


@triton.jit
def tile_of(token_tiles, word_tiles, GROUP: tl.constexpr):
    """Which tile a program makes: GROUP tiles of tokens together take one tile of words after the other."""
    program = tl.program_id(0)
    together = GROUP * word_tiles
    first = program // together * GROUP
    size = tl.minimum(token_tiles - first, GROUP)
    return first + program % together % size, program % together // size


@triton.jit
def at_tokens(values, token, n, other: tl.constexpr):
    """One value a token, as a column."""
    return tl.load(values + token, mask=token < n, other=other)[:, None]


@triton.jit
def write(out, out_stride, dz, token, column, n, count):
    at = out + token.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(at, dz.to(out.dtype.element_ty), mask=(token < n)[:, None] & (column < count)[None, :])


@triton.jit
def logprob_grad_kernel(
    x, rows, x_stride, w, w_stride, bias, target, temperature, softcap, lse, scale, d_logp, entropy, d_entropy,
    out, out_stride, n, vocab, width, first, count, token_tiles, word_tiles,
    EVEN_H: tl.constexpr, EVEN_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """p (scale - d_entropy (ln p + entropy)), and d_logp more at the target."""
    tile, block = tile_of(token_tiles, word_tiles, GROUP)
    token, column = tile * T + tl.arange(0, T), block * W + tl.arange(0, W)
    words = first + column
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
    dz = tl.exp(log_p) * slope
    y = at_tokens(target, token, n, -1)
    dz = tl.where(words[None, :] == y, dz + at_tokens(d_logp, token, n, 0.0), dz)
    write(out, out_stride, unfinish(dz, z, softcap, t), token, column, n, count)


@triton.jit
def distill_grad_kernel(
    x, rows, x_stride, w, w_stride, bias, y, y_stride, v, v_stride, teacher_bias,
    temperature, softcap, lse, teacher_lse, centre, d_loss, beta,
    out, out_stride, n, vocab, width, teacher_width, first, count, token_tiles, word_tiles,
    KIND: tl.constexpr, SHARED: tl.constexpr, EVEN_H: tl.constexpr, EVEN_G: tl.constexpr, EVEN_V: tl.constexpr,
    OPERAND: tl.constexpr, TEACHER_OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of KL(p || q): p (ln p - ln q - KL). Of KL(q || p): p - q. Of JSD: (1 - beta) p (ln p/m - sum p ln p/m)."""
    tile, block = tile_of(token_tiles, word_tiles, GROUP)
    token, column = tile * T + tl.arange(0, T), block * W + tl.arange(0, W)
    words = first + column
    t = None
    if temperature is not None:
        t = tl.load(temperature + token, mask=token < n, other=1.0)
    z_p, z_q = pair_tile(
        hidden_rows(x, rows, token, n, x_stride), weight_rows(w, words, vocab, w_stride),
        hidden_rows(y, rows, token, n, y_stride), weight_rows(v, words, vocab, v_stride),
        words, vocab, width, teacher_width, bias, teacher_bias, softcap, t,
        SHARED, EVEN_H, EVEN_G, EVEN_V, OPERAND, TEACHER_OPERAND, PRECISION, T, W, K,
    )  # fmt: skip
    log_p, log_q = z_p - at_tokens(lse, token, n, 0.0), z_q - at_tokens(teacher_lse, token, n, 0.0)
    p = tl.exp(log_p)
    if KIND == "forward_kl":
        dz = p - tl.exp(log_q)
    elif KIND == "reverse_kl":
        gap = tl.where(p > 0, log_p - log_q, 0.0)
        dz = (gap - at_tokens(centre, token, n, 0.0)) * p
    else:
        log_p = tl.where(log_p < FLOOR, FLOOR, log_p)
        to_p, _ = mixture_ratios(log_p, log_q, beta)
        dz = (to_p - at_tokens(centre, token, n, 0.0)) * p * (1.0 - beta)
    dz = dz * at_tokens(d_loss, token, n, 0.0)
    write(out, out_stride, unfinish(dz, z_p, softcap, t), token, column, n, count)
