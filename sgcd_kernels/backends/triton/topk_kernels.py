"""Logits of chosen tiles of words: each token has its own few, so tokens are gathered tile by tile."""

import triton
import triton.language as tl

from sgcd_kernels.triton.forward_kernels import pair_tile
from sgcd_kernels.triton.tiles import hidden_rows, weight_rows


@triton.jit(do_not_specialize=["n", "vocab", "entries", "slots"])
def chosen_logits_kernel(
    x, rows, x_stride, w, w_stride, bias, y, y_stride, v, v_stride, teacher_bias,
    temperature, softcap, order, block_tile, block_start, tile_stop, out,
    n, vocab, width, teacher_width, entries, slots,
    SHARED: tl.constexpr, STACKED: tl.constexpr, EVEN_H: tl.constexpr, EVEN_G: tl.constexpr, EVEN_V: tl.constexpr,
    OPERAND: tl.constexpr, TEACHER_OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[2, entries, W] of student and teacher; entry = token * slots + slot, sorted by their tiles in `order`.

    A program takes T entries of tile block_tile, from block_start on; those from tile_stop on are another tile's.
    """
    block = tl.program_id(0)
    tile = tl.load(block_tile + block)
    if tile * W < vocab:  # else there are fewer blocks than programs
        place = tl.load(block_start + block) + tl.arange(0, T)
        mine = place < tl.load(tile_stop + tile)
        entry = tl.load(order + place, mask=mine, other=0)
        token = entry // slots
        t = None
        if temperature is not None:
            t = tl.load(temperature + token)
        words = (tile * W + tl.arange(0, W)).to(tl.int32)
        z_p, z_q = pair_tile(
            hidden_rows(x, rows, token, n, x_stride), weight_rows(w, words, vocab, w_stride),
            hidden_rows(y, rows, token, n, y_stride), weight_rows(v, words, vocab, v_stride),
            words, vocab, width, teacher_width, bias, teacher_bias, softcap, t,
            SHARED, STACKED, EVEN_H, EVEN_G, EVEN_V, OPERAND, TEACHER_OPERAND, PRECISION, T, W, K,
        )  # fmt: skip
        at = out + entry[:, None] * W + tl.arange(0, W)[None, :]
        tl.store(at, z_p, mask=mine[:, None])
        tl.store(at + entries * W, z_q, mask=mine[:, None])
