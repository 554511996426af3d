"""The teacher's K likeliest words and the mass of all others, in little more than the one pass over the weight.

The pass that sums also notes of every token and tile of words the teacher's largest logit and both heads' mass. A word
of the teacher's best K lies in one of the K tiles with the largest maxima: in any other tile it would stand behind K
words, one a tile. So only these tiles' logits, and those of the observed token's, are made once more (W words of V
each), and the tail is the mass of all other tiles plus that of the words left over in these: sums of positive numbers,
where 1 minus the rest would leave only rounding beside a certain word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.kernel_inputs import local_targets, part_of, temperatures
from sgcd_kernels.shard import max_over, shard_range, sum_over
from sgcd_kernels.torch_backend.divergence import PairStats
from sgcd_kernels.torch_backend.topk import TeacherTopK
from sgcd_kernels.triton import launch
from sgcd_kernels.triton.launch import Head, ceil_div
from sgcd_kernels.triton.partials import merged_pair
from sgcd_kernels.triton.topk_kernels import chosen_logits_kernel
from sgcd_kernels.types import Projection

CHUNK_BYTES = 128 << 20  # of what a chunk of tokens holds
TOKEN_MULTIPLE = 16
LOWEST = torch.finfo(torch.float32).min


def chunk_tokens(top_k: int, vocab: int, words: int) -> int:
    """Tokens at a time: a token holds 3 numbers a tile and copies of them, its tiles' logits and copies of these."""
    tiles = ceil_div(vocab, words)
    chosen = (min(top_k, tiles) + 1) * words
    tokens = max(1, CHUNK_BYTES // (4 * 8 * tiles + 4 * 12 * chosen))
    # What is per token then begins on sixteen bytes in every chunk, so that none compiles kernels anew.
    return tokens if tokens < TOKEN_MULTIPLE else tokens // TOKEN_MULTIPLE * TOKEN_MULTIPLE


def pair_stats(
    student: Projection,
    teacher: Projection,
    targets: Tensor,  # [n]
    top_k: int,
    group: ProcessGroup | None,
) -> tuple[PairStats, dict[str, Tensor]]:
    """The merged sums of both heads, and the KLs over the buckets."""
    n, vocab = student.num_rows, student.weight.shape[0]
    words = launch.pair_config(student, Head.of(student), Head.of(teacher), peaks=True).words
    step = chunk_tokens(top_k, vocab if group is None else shard_range(student.weight, group)[1], words)
    if group is not None:  # ranks must agree, and their tiles may differ: by device, or by where their weights lie
        step = -int(max_over(torch.tensor([-step], device=student.weight.device), group))
    parts = []
    for start in range(0, n, step) or (0,):  # no tokens have their fields too
        cut = slice(start, min(start + step, n))
        parts.append(_chunk(part_of(student, cut), part_of(teacher, cut), targets[cut], top_k, words, group))
    stats = PairStats(0, student.hidden.new_empty(0, dtype=torch.float32))
    for side in ("p", "q"):
        of = [getattr(part, side) for part, _ in parts]
        for name in ("m", "z", "s", "target"):
            setattr(getattr(stats, side), name, torch.cat([getattr(x, name) for x in of]))
    stats.a_p, stats.a_q, stats.overlap = (
        torch.cat([getattr(part, name) for part, _ in parts]) for name in ("a_p", "a_q", "overlap")
    )
    return stats, {name: torch.cat([fields[name] for _, fields in parts]) for name in parts[0][1]}


def _chunk(
    student: Projection,
    teacher: Projection,
    targets: Tensor,
    top_k: int,
    words: int,
    group: ProcessGroup | None,
) -> tuple[PairStats, dict[str, Tensor]]:
    n, vocab = student.num_rows, student.weight.shape[0]
    local, offset = local_targets(targets, student, group), shard_range(student.weight, group)[0]
    peaks = student.hidden.new_empty((3, ceil_div(vocab, words), n), dtype=torch.float32)
    stats = merged_pair(launch.pair_stats(student, teacher, local, peaks))
    stats.merge(group)
    best = TeacherTopK(top_k, targets)
    if n == 0:
        return stats, best.results(stats.p, stats.q, stats.p.z, stats.q.z)
    tiles, present = _tiles_of(peaks[0], local, vocab, words, top_k)
    tail_p, tail_q = (_others(x, tiles, present, of.m + of.z.log()) for x, of in zip(peaks[1:], (stats.p, stats.q)))
    z_p, z_q = _logits(student, teacher, tiles, present, words)
    number = (tiles.unsqueeze(2) * words + torch.arange(words, device=tiles.device)).flatten(1)
    exists = present.repeat_interleave(words, 1) & (number < vocab)
    # A forbidden word of the vocabulary still comes before what is no word, which was not computed either.
    at = torch.where(exists, z_q.clamp(min=LOWEST), -torch.inf).topk(min(top_k, vocab), dim=1).indices
    best.q, best.p, best.words = z_q.gather(1, at), z_p.gather(1, at), number.gather(1, at)
    rest = exists.scatter(1, at, False) & (number != local.unsqueeze(1))
    tail_p, tail_q = (
        tail + torch.where(rest, (z - of.m.unsqueeze(1) - of.z.log().unsqueeze(1)).exp(), 0.0).sum(1)
        for tail, z, of in ((tail_p, z_p, stats.p), (tail_q, z_q, stats.q))
    )
    best.words = best.words + offset
    if group is not None:
        mine = best.p, best.q, best.words
        best.merge(group)
        out = _left_out(mine[2], best.words) & (mine[2] != targets.unsqueeze(1))
        tail_p, tail_q = (
            sum_over(
                tail + torch.where(out, (z - of.m.unsqueeze(1) - of.z.log().unsqueeze(1)).exp(), 0.0).sum(1), group
            )
            for tail, z, of in ((tail_p, mine[0], stats.p), (tail_q, mine[1], stats.q))
        )
    return stats, best.results(stats.p, stats.q, tail_p, tail_q)


def _left_out(mine: Tensor, chosen: Tensor) -> Tensor:  # [n, k], [n, K] -> [n, k]
    """Which of this rank's best words are not among the best of all ranks."""
    chosen = chosen.sort(1).values
    at = torch.searchsorted(chosen, mine).clamp(max=chosen.shape[1] - 1)
    return chosen.gather(1, at) != mine


def _tiles_of(
    largest: Tensor,  # [tiles, n]
    targets: Tensor,  # [n]
    vocab: int,
    words: int,
    top_k: int,
) -> tuple[Tensor, Tensor]:  # [n, slots], [n, slots]
    """The tiles to be made again, and which of them count: the observed token's may be among the best already."""
    best = largest.topk(min(top_k, largest.shape[0]), dim=0).indices.t()
    own = torch.where((targets >= 0) & (targets < vocab), targets, 0) // words
    known = (best == own.unsqueeze(1)).any(1, keepdim=True)
    return torch.cat([best, own.unsqueeze(1)], 1), torch.cat([torch.ones_like(best, dtype=torch.bool), ~known], 1)


def _others(mass: Tensor, tiles: Tensor, present: Tensor, lse: Tensor) -> Tensor:  # [tiles, n], ... -> [n]
    """The probability of all tiles but the chosen ones."""
    return (mass - lse).exp_().t().contiguous().scatter_(1, tiles, 0.0).sum(1)


@dataclass(frozen=True)
class _Blocks:
    """Entries (token, slot) sorted by tile and cut into blocks that are all of one tile; nothing waits for the GPU."""

    order: Tensor  # [entries]
    tile: Tensor  # [blocks]
    start: Tensor  # [blocks]
    stop: Tensor  # [tiles]


def _blocks(tiles: Tensor, size: int, num_tiles: int) -> _Blocks:  # [entries]
    by_tile, order = tiles.sort(stable=True)
    edges = torch.searchsorted(by_tile, torch.arange(num_tiles + 1, device=tiles.device))
    upto = ((edges.diff() + size - 1) // size).cumsum(0)
    block = torch.arange(num_tiles + tiles.numel() // size, device=tiles.device)  # as many as there can be
    tile = torch.searchsorted(upto, block, right=True)
    before = torch.cat([upto.new_zeros(1), upto])[tile]
    return _Blocks(order, tile, edges[tile] + (block - before) * size, edges[1:].contiguous())


def _logits(
    student: Projection, teacher: Projection, tiles: Tensor, present: Tensor, words: int
) -> tuple[Tensor, Tensor]:  # [n, slots * words] each
    """Both heads' logits of each token's own tiles; whatever lies there where a slot is not present."""
    head, other, vocab = Head.of(student), Head.of(teacher), student.weight.shape[0]
    config, num_tiles = launch.pair_config(student, head, other, peaks=True), ceil_div(vocab, words)
    blocks = _blocks(torch.where(present, tiles, num_tiles).flatten(), config.tokens, num_tiles)
    out = torch.empty((2, tiles.numel(), words), dtype=torch.float32, device=head.x.device)
    flags = launch.pair_flags(head, other, config, vocab % words == 0) | {"STACKED": False}
    launch.for_rows(chosen_logits_kernel, head, other)[(blocks.tile.numel(),)](
        *launch.pair_pointers(head, other, student.rows), temperatures(student), student.softcap,
        blocks.order, blocks.tile, blocks.start, blocks.stop, out,
        student.num_rows, vocab, head.x.shape[1], other.x.shape[1], tiles.numel(), tiles.shape[1],
        **flags, **launch.shape_options(config),
    )  # fmt: skip
    z_p, z_q = out.view(2, student.num_rows, -1).unbind(0)
    return z_p, z_q
