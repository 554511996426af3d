"""Vocab-parallel heads: every rank holds some rows of the weight, and the partial statistics merge exactly."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def name_of(group: object) -> str:
    """How a group travels through an op, which takes no objects; the empty name is none."""
    if group is None:
        return ""
    if not isinstance(group, ProcessGroup):
        hint = "of a DeviceMesh that is mesh.get_group()"
        raise ValueError(f"group is a {type(group).__name__}, needs a torch.distributed.ProcessGroup or None; {hint}")
    name: str = group.group_name
    return name


def group_of(name: str) -> ProcessGroup | None:
    if not name:
        return None
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    group: ProcessGroup = resolve(name)
    return group


def shard_range(weight: Tensor, group: ProcessGroup | None) -> tuple[int, int]:
    """(the first word of this rank's shard, words on all ranks). Shards may differ in size; ranks are in order."""
    if group is None:
        return 0, int(weight.shape[0])
    counts = [int(size) for size in gather_over(torch.tensor([weight.shape[0]], device=weight.device), group)]
    return sum(counts[: dist.get_rank(group)]), sum(counts)


def gather_over(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's, in order; all of one shape."""
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, x.contiguous(), group=group)
    return out


def sum_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks, in place."""
    if group is not None:
        dist.all_reduce(x, dist.ReduceOp.SUM, group=group)
    return x


def max_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Maximum over the ranks; a new tensor."""
    if group is None:
        return x
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x
