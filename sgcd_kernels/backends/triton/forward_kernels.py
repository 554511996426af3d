"""Running statistics of one head, of two, and the sums that need both normalisers first.

A program takes one tile of tokens and one share of the vocabulary, makes the logits of T x W at a time and folds them
into statistics that stay in registers until they are written as `out[share, field, token]`. `partials.py` merges the
shares.
"""

import triton
import triton.language as tl

from sgcd_kernels.triton.tiles import (
    INFINITY,
    LOG2_E,
    LOWEST,
    exp,
    finish,
    hidden_rows,
    mixture_ratios,
    product,
    shared_product,
    stacked_rows,
    tile_of,
    unstack,
    weight_rows,
)

# Numbers that change from call to call. Specialised for those that 16 divides, a step in training would compile anew
# whenever another number of tokens is left.
VARYING = ["n", "vocab", "first", "count", "words_per_share", "token_tiles", "word_tiles", "shares", "group"]


@triton.jit
def rescale(m, z, s, to):
    """Bring sums to the maximum `to`; give the shift of exponents. Before the first tile there is nothing to shift."""
    shift = tl.where(z > 0, m - to, 0.0)
    shrink = exp(shift)
    return z * shrink, tl.where(shrink > 0, (s + shift * z) * shrink, 0.0), shift


@triton.jit
def put(out, field, token, value, n, fields: tl.constexpr, share):
    tl.store(out + (share * fields + field).to(tl.int64) * n + token, value, mask=token < n)


@triton.jit
def own_targets(target, token, n, vocab):
    """Targets, or -1 for words of another rank's shard: the words that fill up a last tile are not theirs."""
    y = tl.load(target + token, mask=token < n, other=-1)
    return tl.where(y < vocab, y, -1)


@triton.jit
def picked(z, words, target):
    """The targets' logits where they lie in this tile, else 0."""
    hit = words[None, :] == target[:, None]
    return tl.sum(tl.where(hit, z, 0.0), 1)


@triton.jit
def any_nan(sums):
    """Whether a tile must be folded again with guards.

    0 ln 0 = 0, but 0 times the infinity of a forbidden word's logit is NaN. Guarding every product would make a third
    of the fold's instructions, so tiles are folded without, and only those with such a word once more.
    """
    return tl.max((sums != sums).to(tl.int32), 0) > 0


@triton.jit
def fold_head(z, m, GUARD: tl.constexpr):
    """The sums of one tile around a given maximum: z and s."""
    if GUARD:
        z = tl.where(z == -INFINITY, LOWEST, z)
    centred = z - m[:, None]
    e = exp(centred)
    if GUARD:
        centred = tl.where(e > 0, centred, 0.0)
    return tl.sum(e, 1), tl.sum(e * centred, 1)


@triton.jit(do_not_specialize=VARYING)
def head_stats_kernel(
    x, rows, x_stride, w, w_stride, bias, target, temperature, softcap, out,
    n, vocab, width, words_per_share, token_tiles, shares, group,
    EVEN_H: tl.constexpr, EVEN_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr, FLAT: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """out[share] = m, z, s, target logit: m = max z, z = sum e^(z-m), s = sum e^(z-m) (z-m)."""
    tile, share = tile_of(token_tiles, shares, group)
    token = tile * T + tl.arange(0, T)
    x_tile = hidden_rows(x, rows, token, n, x_stride)
    y = own_targets(target, token, n, vocab)
    t = None
    if temperature is not None:
        t = tl.load(temperature + token, mask=token < n, other=1.0)
    m = tl.full((T,), LOWEST, tl.float32)
    z_sum, s_sum, hit = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32)
    first = share * words_per_share
    for word in tl.range(first, tl.minimum(first + words_per_share, vocab), W, flatten=FLAT):
        words = word + tl.arange(0, W)
        z = product(x_tile, weight_rows(w, words, vocab, w_stride), width, EVEN_H, OPERAND, PRECISION, T, W, K)
        z = finish(z, words, vocab, bias, softcap, t, EVEN_V)
        if tl.max(((y >= word) & (y < word + W)).to(tl.int32), 0) > 0:
            hit += picked(z, words, y)
        to = tl.maximum(m, tl.max(z, 1))
        z_sum, s_sum, _ = rescale(m, z_sum, s_sum, to)
        m = to
        more_z, more_s = fold_head(z, m, GUARDED)
        if not GUARDED:  # noqa: SIM102  # a constant: what is left out is not compiled
            if any_nan(more_s):
                more_z, more_s = fold_head(z, m, True)
        z_sum += more_z
        s_sum += more_s
    put(out, 0, token, m, n, 4, share)
    put(out, 1, token, z_sum, n, 4, share)
    put(out, 2, token, s_sum, n, 4, share)
    put(out, 3, token, hit, n, 4, share)


@triton.jit
def fold_pair(z_p, z_q, m_p, m_q, GUARD: tl.constexpr):
    """The sums of one tile around given maxima: z, s and a of the student, of the teacher, then the overlap."""
    y_p, y_q = z_p, z_q
    if GUARD:
        y_p, y_q = tl.where(z_p == -INFINITY, LOWEST, z_p), tl.where(z_q == -INFINITY, LOWEST, z_q)
    c_p, c_q, delta_p, delta_q = y_p - m_p[:, None], y_q - m_q[:, None], y_p - z_q, z_p - y_q
    # Of the roots: their squares are the exponentials, their product is the overlap, and nothing underflows sooner than
    # it must.
    r_p, r_q = tl.exp2(c_p * (0.5 * LOG2_E)), tl.exp2(c_q * (0.5 * LOG2_E))
    e_p, e_q = r_p * r_p, r_q * r_q
    if GUARD:
        c_p, delta_p = tl.where(e_p > 0, c_p, 0.0), tl.where(e_p > 0, delta_p, 0.0)
        c_q, delta_q = tl.where(e_q > 0, c_q, 0.0), tl.where(e_q > 0, delta_q, 0.0)
    return (
        tl.sum(e_p, 1), tl.sum(e_p * c_p, 1), tl.sum(e_p * delta_p, 1),
        tl.sum(e_q, 1), tl.sum(e_q * c_q, 1), tl.sum(e_q * delta_q, 1), tl.sum(r_p * r_q, 1),
    )  # fmt: skip


@triton.jit
def pair_rows(x, y, rows, tile, n, x_stride, y_stride, STACKED: tl.constexpr, T: tl.constexpr):
    """Both heads' rows of hidden; if stacked, all of them as one operand, twice."""
    if STACKED:
        both = stacked_rows(x, y, rows, tile, n, x_stride, y_stride, T)
        x_rows, y_rows = both, both
    else:
        token = tile * T + tl.arange(0, T)
        x_rows, y_rows = hidden_rows(x, rows, token, n, x_stride), hidden_rows(y, rows, token, n, y_stride)
    return x_rows, y_rows


@triton.jit
def pair_tile(
    x, w, y, v, words, vocab, width, teacher_width, bias, teacher_bias, softcap, t,
    SHARED: tl.constexpr, STACKED: tl.constexpr, EVEN_H: tl.constexpr, EVEN_G: tl.constexpr, EVEN_V: tl.constexpr,
    OPERAND: tl.constexpr, TEACHER_OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Both heads' final logits of one tile, of rows that `pair_rows` gave."""
    if STACKED:
        z_p, z_q = unstack(product(x, w, width, EVEN_H, OPERAND, PRECISION, 2 * T, W, K), T, W)
    elif SHARED:
        z_p, z_q = shared_product(x, y, w, width, EVEN_H, OPERAND, PRECISION, T, W, K)
    else:
        z_p = product(x, w, width, EVEN_H, OPERAND, PRECISION, T, W, K)
        z_q = product(y, v, teacher_width, EVEN_G, TEACHER_OPERAND, PRECISION, T, W, K)
    z_p = finish(z_p, words, vocab, bias, softcap, t, EVEN_V)
    z_q = finish(z_q, words, vocab, teacher_bias, softcap, t, EVEN_V)
    return z_p, z_q


@triton.jit(do_not_specialize=VARYING)
def pair_stats_kernel(
    x, rows, x_stride, w, w_stride, bias, y, y_stride, v, v_stride, teacher_bias,
    target, temperature, softcap, out, peaks, n, vocab, width, teacher_width,
    words_per_share, token_tiles, shares, group,
    SHARED: tl.constexpr, STACKED: tl.constexpr, EVEN_H: tl.constexpr, EVEN_G: tl.constexpr, EVEN_V: tl.constexpr,
    OPERAND: tl.constexpr, TEACHER_OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr, FLAT: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """out[share] = m, z, s, target logit of the student (x, w), of the teacher (y, v), then a_p, a_q, overlap.

    peaks[3, tiles of words, n] are each tile's largest logit of the teacher and both its log-sum-exps: see `topk.py`.
    """
    tile, share = tile_of(token_tiles, shares, group)
    token = tile * T + tl.arange(0, T)
    x_tile, y_tile = pair_rows(x, y, rows, tile, n, x_stride, y_stride, STACKED, T)
    word_of_token = own_targets(target, token, n, vocab)
    t = None
    if temperature is not None:
        t = tl.load(temperature + token, mask=token < n, other=1.0)
    m_p, m_q = tl.full((T,), LOWEST, tl.float32), tl.full((T,), LOWEST, tl.float32)
    z_p_sum, s_p_sum, hit_p = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32)
    z_q_sum, s_q_sum, hit_q = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32)
    a_p, a_q, overlap = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32)
    first = share * words_per_share
    for word in tl.range(first, tl.minimum(first + words_per_share, vocab), W, flatten=FLAT):
        words = word + tl.arange(0, W)
        z_p, z_q = pair_tile(
            x_tile, weight_rows(w, words, vocab, w_stride), y_tile, weight_rows(v, words, vocab, v_stride),
            words, vocab, width, teacher_width, bias, teacher_bias, softcap, t,
            SHARED, STACKED, EVEN_H, EVEN_G, EVEN_V, OPERAND, TEACHER_OPERAND, PRECISION, T, W, K,
        )  # fmt: skip
        if tl.max(((word_of_token >= word) & (word_of_token < word + W)).to(tl.int32), 0) > 0:
            hit_p += picked(z_p, words, word_of_token)
            hit_q += picked(z_q, words, word_of_token)
        to_p, to_q = tl.maximum(m_p, tl.max(z_p, 1)), tl.maximum(m_q, tl.max(z_q, 1))
        z_p_sum, s_p_sum, shift_p = rescale(m_p, z_p_sum, s_p_sum, to_p)
        z_q_sum, s_q_sum, shift_q = rescale(m_q, z_q_sum, s_q_sum, to_q)
        # Mass that underflows takes an infinite difference with it: 0 times inf would be NaN.
        a_p = tl.where(exp(shift_p) > 0, a_p * exp(shift_p), 0.0)
        a_q = tl.where(exp(shift_q) > 0, a_q * exp(shift_q), 0.0)
        overlap *= exp((shift_p + shift_q) * 0.5)
        m_p, m_q = to_p, to_q
        more_z_p, more_s_p, more_a_p, more_z_q, more_s_q, more_a_q, more_overlap = fold_pair(
            z_p, z_q, m_p, m_q, GUARDED
        )
        if not GUARDED:  # noqa: SIM102
            if any_nan(more_s_p + more_a_p + more_s_q + more_a_q):
                more_z_p, more_s_p, more_a_p, more_z_q, more_s_q, more_a_q, more_overlap = fold_pair(
                    z_p, z_q, m_p, m_q, True
                )
        if peaks is not None:
            at = peaks + word // W * n + token
            apart = (vocab + W - 1) // W * n
            tl.store(at, tl.max(z_q, 1), mask=token < n)
            tl.store(at + apart, m_p + tl.log(more_z_p), mask=token < n)
            tl.store(at + 2 * apart, m_q + tl.log(more_z_q), mask=token < n)
        z_p_sum += more_z_p
        s_p_sum += more_s_p
        a_p += more_a_p
        z_q_sum += more_z_q
        s_q_sum += more_s_q
        a_q += more_a_q
        overlap += more_overlap
    put(out, 0, token, m_p, n, 11, share)
    put(out, 1, token, z_p_sum, n, 11, share)
    put(out, 2, token, s_p_sum, n, 11, share)
    put(out, 3, token, hit_p, n, 11, share)
    put(out, 4, token, m_q, n, 11, share)
    put(out, 5, token, z_q_sum, n, 11, share)
    put(out, 6, token, s_q_sum, n, 11, share)
    put(out, 7, token, hit_q, n, 11, share)
    put(out, 8, token, a_p, n, 11, share)
    put(out, 9, token, a_q, n, 11, share)
    put(out, 10, token, overlap, n, 11, share)


@triton.jit(do_not_specialize=VARYING)
def mixture_stats_kernel(
    x, rows, x_stride, w, w_stride, bias, y, y_stride, v, v_stride, teacher_bias,
    normalisers, temperature, softcap, beta, out, n, vocab, width, teacher_width,
    words_per_share, token_tiles, shares, group,
    SHARED: tl.constexpr, STACKED: tl.constexpr, EVEN_H: tl.constexpr, EVEN_G: tl.constexpr, EVEN_V: tl.constexpr,
    OPERAND: tl.constexpr, TEACHER_OPERAND: tl.constexpr, PRECISION: tl.constexpr, JSD: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """out[share] = tv, jsd, sum p ln(p / m), given normalisers[4, n]: m and ln z of the student, then the teacher."""
    tile, share = tile_of(token_tiles, shares, group)
    token = tile * T + tl.arange(0, T)
    x_tile, y_tile = pair_rows(x, y, rows, tile, n, x_stride, y_stride, STACKED, T)
    t = None
    if temperature is not None:
        t = tl.load(temperature + token, mask=token < n, other=1.0)
    m_p = tl.load(normalisers + token, mask=token < n, other=0.0)
    log_z_p = tl.load(normalisers + n + token, mask=token < n, other=0.0)
    m_q = tl.load(normalisers + 2 * n + token, mask=token < n, other=0.0)
    log_z_q = tl.load(normalisers + 3 * n + token, mask=token < n, other=0.0)
    tv, jsd, centre = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32)
    first = share * words_per_share
    for word in tl.range(first, tl.minimum(first + words_per_share, vocab), W, flatten=FLAT):
        words = word + tl.arange(0, W)
        z_p, z_q = pair_tile(
            x_tile, weight_rows(w, words, vocab, w_stride), y_tile, weight_rows(v, words, vocab, v_stride),
            words, vocab, width, teacher_width, bias, teacher_bias, softcap, t,
            SHARED, STACKED, EVEN_H, EVEN_G, EVEN_V, OPERAND, TEACHER_OPERAND, PRECISION, T, W, K,
        )  # fmt: skip
        # In two steps: at large logits one rounded normaliser would cost digits.
        log_p, log_q = z_p - m_p[:, None] - log_z_p[:, None], z_q - m_q[:, None] - log_z_q[:, None]
        p, q = exp(log_p), exp(log_q)
        tv += tl.sum(tl.abs(p - q), 1)
        if JSD:
            to_p, to_q = mixture_ratios(log_p, log_q, beta)
            centre += tl.sum(p * to_p, 1)
            jsd += tl.sum((1.0 - beta) * (p * to_p) + beta * (q * to_q), 1)
    put(out, 0, token, tv * 0.5, n, 3, share)
    put(out, 1, token, jsd, n, 3, share)
    put(out, 2, token, centre, n, 3, share)
