"""The teacher's K most likely vocab ids and the mass of all others, in little more than the one pass over the weight.

`pair_stats` also notes, per token and vocab tile, the teacher's largest logit and both heads' mass (`peaks`). Each of
the teacher's K best ids lies in one of the K tiles with the largest maxima: in any other tile it would stand behind K
ids, one per tile. So only the logits of these tiles, and of the target's, are made once more (BLOCK_V ids each).

The tail is the mass of all other tiles plus that of the ids left over in these: sums of positive numbers, where 1 minus
the rest would leave only rounding beside an id of probability 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgcd_kernels.backends.triton import launch
from sgcd_kernels.backends.triton.configs import Config
from sgcd_kernels.backends.triton.launch import EntrySizes, Head, ceil_div
from sgcd_kernels.backends.triton.tiles import HeadPlaces, hidden_rows, pair_logits
from sgcd_kernels.core.lm_head import Projection, max_over, shard_range, sum_over
from sgcd_kernels.core.statistics import HeadStats, PairStats, TeacherTopK

CHUNK_BYTES = 128 << 20  # of what a chunk of tokens holds
TOKEN_MULTIPLE = 16
LOWEST = torch.finfo(torch.float32).min


def pair_block_v(student: Projection, teacher: Projection) -> int:
    """Vocab ids of a tile of `pair_stats`, where it notes peaks."""
    return _config(student, Head.of(student), Head.of(teacher)).block_v


def _config(student: Projection, head: Head, other: Head) -> Config:
    return launch.pair_config(student, head, other, has_epilogue=True)


def token_chunks(student: Projection, top_k: int, block_v: int) -> Iterator[slice]:
    """The tokens in chunks that keep to the budget."""
    n, group = student.num_rows, student.head.group
    step = chunk_size(top_k, shard_range(student.head)[1], block_v)
    if group is not None:  # ranks must agree, and their tiles may differ: by device, or by where their weights lie
        step = -int(max_over(torch.tensor([-step], device=student.head.weight.device), group))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def chunk_size(top_k: int, vocab: int, block_v: int) -> int:
    """Tokens per chunk: each holds 5 numbers per tile and copies of them, its tiles' logits and copies of these."""
    tiles = ceil_div(vocab, block_v)
    chosen = (min(top_k, tiles) + 1) * block_v
    tokens = max(1, CHUNK_BYTES // (4 * 10 * tiles + 4 * 12 * chosen))
    # What is per token then begins on sixteen bytes in every chunk, so that none compiles kernels anew.
    return tokens if tokens < TOKEN_MULTIPLE else tokens // TOKEN_MULTIPLE * TOKEN_MULTIPLE


def empty_peaks(student: Projection, block_v: int) -> Tensor:  # [5, vocab tiles, n]
    """What `pair_stats` fills, of each tile: the teacher's largest logit, and of both heads a maximum and the logarithm
    of the mass relative to it, which rounded to one number would lose digits.
    """
    tiles = ceil_div(student.vocab, block_v)
    return student.hidden.new_empty((5, tiles, student.num_rows), dtype=torch.float32)


def bucket_divergences(
    student: Projection, teacher: Projection, targets: Tensor, stats: PairStats, peaks: Tensor, top_k: int
) -> dict[str, Tensor]:
    """The KLs over {the K ids, the target, a tail of all others}, given the merged statistics of these tokens."""
    group, vocab, local = student.head.group, student.vocab, student.local_targets(targets)
    head, other = Head.of(student), Head.of(teacher)
    config = _config(student, head, other)
    block_v = config.block_v
    tiles, present = _choose_tiles(peaks[0], local, vocab, block_v, top_k)
    _, m_p, mass_p, m_q, mass_q = peaks.unbind(0)
    tail_p, tail_q = _other_tiles(m_p, mass_p, tiles, stats.p), _other_tiles(m_q, mass_q, tiles, stats.q)
    z_p, z_q = _tile_logits(student, head, other, config, tiles, present)
    ids = (tiles.unsqueeze(2) * block_v + torch.arange(block_v, device=tiles.device)).flatten(1)
    exists = present.repeat_interleave(block_v, 1) & (ids < vocab)
    # An id of probability 0 still comes before one beyond the vocabulary, whose logit was not computed either.
    at = torch.where(exists, z_q.clamp(min=LOWEST), -torch.inf).topk(min(top_k, vocab), dim=1).indices
    mine = TeacherTopK(q=z_q.gather(1, at), p=z_p.gather(1, at), ids=ids.gather(1, at) + shard_range(student.head)[0])
    rest = exists.scatter(1, at, False) & (ids != local.unsqueeze(1))
    tail_p, tail_q = tail_p + _mass(z_p, stats.p, rest), tail_q + _mass(z_q, stats.q, rest)
    best = mine.merged(top_k, group)
    if group is not None:
        left_out = _absent(mine.ids, best.ids) & (mine.ids != targets.unsqueeze(1))
        tail_p = sum_over(tail_p + _mass(mine.p, stats.p, left_out), group)
        tail_q = sum_over(tail_q + _mass(mine.q, stats.q, left_out), group)
    return best.results(stats, targets, tail_p, tail_q)


def _choose_tiles(
    largest: Tensor,  # [tiles, n]
    targets: Tensor,  # [n]
    vocab: int,
    block_v: int,
    top_k: int,
) -> tuple[Tensor, Tensor]:  # [n, slots], [n, slots]
    """The tiles to be made again, and which of them count: the target's may be among the best already."""
    best = largest.topk(min(top_k, largest.shape[0]), dim=0).indices.t()
    own = torch.where((targets >= 0) & (targets < vocab), targets, 0) // block_v
    known = (best == own.unsqueeze(1)).any(1, keepdim=True)
    return torch.cat([best, own.unsqueeze(1)], 1), torch.cat([torch.ones_like(best, dtype=torch.bool), ~known], 1)


def _other_tiles(m: Tensor, log_mass: Tensor, tiles: Tensor, stats: HeadStats) -> Tensor:  # [tiles, n]..., [n, slots]
    """The probability [n] of all tiles but the chosen ones."""
    return (m - stats.m).add_(log_mass).sub_(stats.log_l).exp_().t().contiguous().scatter_(1, tiles, 0.0).sum(1)


def _mass(z: Tensor, stats: HeadStats, where: Tensor) -> Tensor:  # [n, k] -> [n]
    """The probability of some vocab ids, given their logits."""
    return torch.where(where, (z - stats.m.unsqueeze(1) - stats.log_l.unsqueeze(1)).exp(), 0.0).sum(1)


def _absent(mine: Tensor, chosen: Tensor) -> Tensor:  # [n, k], [n, K] -> [n, k]
    """Which of this rank's best ids are not among the best of all ranks."""
    chosen = chosen.sort(1).values
    at = torch.searchsorted(chosen, mine).clamp(max=chosen.shape[1] - 1)
    return chosen.gather(1, at) != mine


class Blocks(NamedTuple):
    """Entries (token, slot) sorted by tile and cut into blocks that are all of one tile; nothing waits for the GPU."""

    order: Tensor  # [entries]
    tile: Tensor  # [blocks]
    start: Tensor  # [blocks]
    stop: Tensor  # [tiles]


def _blocks(tiles: Tensor, size: int, num_tiles: int) -> Blocks:  # [entries]
    by_tile, order = tiles.sort(stable=True)
    edges = torch.searchsorted(by_tile, torch.arange(num_tiles + 1, device=tiles.device))
    upto = ((edges.diff() + size - 1) // size).cumsum(0)
    block = torch.arange(num_tiles + tiles.numel() // size, device=tiles.device)  # as many as there can be
    tile = torch.searchsorted(upto, block, right=True)
    before = torch.cat([upto.new_zeros(1), upto])[tile]
    return Blocks(order, tile, edges[tile] + (block - before) * size, edges[1:].contiguous())


def _tile_logits(
    student: Projection,
    head: Head,
    other: Head,
    config: Config,
    tiles: Tensor,  # [n, slots]
    present: Tensor,  # [n, slots]
) -> tuple[Tensor, Tensor]:  # [n, slots * BLOCK_V] each
    """Both heads' logits of each token's own tiles; whatever lies there where a slot is not present."""
    sizes = EntrySizes(student.num_rows, student.vocab, tiles.numel(), tiles.shape[1])
    num_tiles = ceil_div(sizes.vocab, config.block_v)
    blocks = _blocks(torch.where(present, tiles, num_tiles).flatten(), config.block_n, num_tiles)
    out = student.hidden.new_empty((2, sizes.entries, config.block_v), dtype=torch.float32)
    launch.variant(chosen_logits_kernel, head, other)[(blocks.tile.numel(),)](
        **launch.pair_places(head, other), rows=student.rows, transform=launch.transform(student, head, other),
        blocks=blocks, out=out, **sizes._asdict(),
        META=launch.meta(config, sizes.vocab, head, other)._replace(STACKED=False), **launch.options(config),
    )  # fmt: skip
    z_p, z_q = out.view(2, sizes.n, -1).unbind(0)
    return z_p, z_q


@triton.jit(do_not_specialize=launch.SIZES)
def chosen_logits_kernel(
    hidden, hidden_stride, weight, weight_stride, width,
    teacher_hidden, teacher_hidden_stride, teacher_weight, teacher_weight_stride, teacher_width,
    rows, transform, blocks, out, n, vocab, entries, slots, META: tl.constexpr,
):  # fmt: skip
    """out[2, entries, BLOCK_V] of student and teacher; entry = token * slots + slot, sorted by tiles in `blocks.order`.

    A program takes BLOCK_N entries of one tile, from its block's start on; those from the tile's stop on are another's.
    """
    student = HeadPlaces(hidden, hidden_stride, weight, weight_stride, width)
    teacher = HeadPlaces(teacher_hidden, teacher_hidden_stride, teacher_weight, teacher_weight_stride, teacher_width)
    block = tl.program_id(0)
    tile = tl.load(blocks.tile + block)
    if tile * META.BLOCK_V < vocab:  # else there are fewer blocks than programs
        place = tl.load(blocks.start + block) + tl.arange(0, META.BLOCK_N)
        mine = place < tl.load(blocks.stop + tile)
        entry = tl.load(blocks.order + place, mask=mine, other=0)
        token = entry // slots
        temperature = None
        if transform.temperature is not None:
            temperature = tl.load(transform.temperature + token)
        vocab_ids = (tile * META.BLOCK_V + tl.arange(0, META.BLOCK_V)).to(tl.int32)
        x_p, x_q = hidden_rows(student, rows, token, n), hidden_rows(teacher, rows, token, n)
        z_p, z_q = pair_logits(x_p, x_q, student, teacher, vocab_ids, vocab, transform, temperature, META)
        at = out + entry[:, None] * META.BLOCK_V + tl.arange(0, META.BLOCK_V)[None, :]
        tl.store(at, z_p, mask=mine[:, None])
        tl.store(at + entries * META.BLOCK_V, z_q, mask=mine[:, None])
