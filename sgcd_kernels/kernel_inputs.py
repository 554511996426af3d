"""What both compiled backends, C++ and Triton, make of a `Projection` before their kernels, and of sums after them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.shard import shard_range
from sgcd_kernels.torch_backend.divergence import PairStats
from sgcd_kernels.types import Projection
from sgcd_kernels.validation import take


def local_targets(targets: Tensor, p: Projection, group: ProcessGroup | None) -> Tensor:  # [n]
    """Targets as rows of this rank's weight; what is no row here is found by none."""
    return (targets - shard_range(p.weight, group)[0]).contiguous()


def values(x: Tensor) -> Tensor:
    """Numbers a token as kernels read them: fp32, one after the other."""
    return x.detach().float().contiguous()


def temperatures(p: Projection) -> Tensor | None:  # [n] fp32
    """One a computed token; None where it is 1."""
    if isinstance(p.temperature, Tensor):
        return values(take(p.temperature, p.rows))
    return None if p.temperature == 1.0 else torch.full((p.num_rows,), p.temperature, device=p.hidden.device)


def part_of(p: Projection, tokens: slice) -> Projection:
    """The same head on a range of its computed tokens."""
    if p.rows is not None:
        return replace(p, rows=p.rows[tokens])
    temperature = p.temperature[tokens] if isinstance(p.temperature, Tensor) else p.temperature
    return replace(p, hidden=p.hidden[tokens], temperature=temperature)


def normalisers(stats: PairStats) -> Tensor:  # [4, n]
    """What the second pass needs of the first: m and ln z of the student, then of the teacher."""
    return torch.stack([stats.p.m, stats.p.z.log(), stats.q.m, stats.q.z.log()])


def mixture_fields(features: Sequence[str], jsd: Tensor, tv: Tensor, mixture_kl: Tensor) -> dict[str, Tensor]:
    """The asked-for results of the second pass, within their bounds."""
    bounded = {"jsd": jsd.clamp(0, math.log(2)), "tv": tv.clamp(0, 1), "mixture_kl": mixture_kl}
    return {name: bounded[name] for name in features}
