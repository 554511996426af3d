"""The LM head, the tokens that it is applied to, and the process group that its vocabulary may be sharded over.

A backend gets `Projection`s: hidden states, the head, and which tokens to compute. Values per computed token are [n],
values per token [N]; `gather` and `scatter` convert between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class LMHead:
    """logits = softcap(hidden @ weight^T + bias) / temperature, where softcap(z) = c tanh(z / c)."""

    weight: Tensor  # [V, H]; with a group, this rank's rows only
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    temperature: float | Tensor = 1.0  # a number, or per token
    group: ProcessGroup | None = None  # ranks that each hold some rows of the weight

    def with_constant_temperature(self) -> LMHead:
        """The same head with its temperature detached: no op gives a temperature a gradient."""
        if not isinstance(self.temperature, Tensor):
            return self
        return replace(self, temperature=self.temperature.detach())


@dataclass(frozen=True)
class Projection:
    """A head applied to the tokens `rows` of hidden states: the input of every backend function."""

    hidden: Tensor  # [N, H]
    head: LMHead
    rows: Tensor | None = None  # [n] int64, the tokens to compute; None is all of them

    @staticmethod
    def of(hidden: Tensor, head: LMHead, rows: Tensor | None = None) -> Projection:
        """From hidden states [N, H] or [B, T, H]."""
        return Projection(hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1]), head, rows)

    def on(self, keep: Tensor) -> Projection:  # [N] bool
        """The same head on the tokens where `keep` is true."""
        return replace(self, rows=indices_of(keep))

    def __getitem__(self, tokens: slice) -> Projection:
        """The same head on a range of its computed tokens."""
        if self.rows is not None:
            return replace(self, rows=self.rows[tokens])
        head, temperature = self.head, self.head.temperature
        if isinstance(temperature, Tensor):
            head = replace(head, temperature=temperature[tokens])
        return replace(self, hidden=self.hidden[tokens], head=head)

    @property
    def num_rows(self) -> int:
        return int((self.hidden if self.rows is None else self.rows).shape[0])

    @property
    def vocab(self) -> int:
        """Rows of the weight on this rank."""
        return int(self.head.weight.shape[0])

    @property
    def stats_dtype(self) -> torch.dtype:
        """fp32, or fp64 when an input is fp64."""
        return stats_dtype(self.hidden, self.head.weight)

    def gather(self, values: Tensor) -> Tensor:  # [N, ...] -> [n, ...]
        return gather_rows(values, self.rows)

    def scatter(self, values: Tensor, shape: torch.Size) -> Tensor:  # [n] -> shape, N values
        """The values at their tokens, 0 elsewhere. The result never shares memory with `values`."""
        if self.rows is None:
            return values.reshape(shape).clone()
        return values.new_zeros(shape.numel()).index_copy_(0, self.rows, values).reshape(shape)

    def local_targets(self, targets: Tensor) -> Tensor:  # [n] -> [n]
        """Targets as rows of this rank's weight. Those of other ranks lie outside [0, V)."""
        return (targets - shard_range(self.head)[0]).contiguous()

    def temperature_per_row(self) -> Tensor | None:  # [n] fp32
        """The temperature of each computed token; None if all are 1."""
        temperature = self.head.temperature
        if isinstance(temperature, Tensor):
            return as_fp32(self.gather(temperature))
        return None if temperature == 1.0 else torch.full((self.num_rows,), temperature, device=self.hidden.device)


class Needs(NamedTuple):
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool

    @staticmethod
    def of(hidden: Tensor, head: LMHead) -> Needs:
        """The gradients that autograd would record now."""
        recording = torch.is_grad_enabled()
        return Needs(*(recording and x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)))


class HeadGrads(NamedTuple):
    """Gradients of hidden states and head; None where not requested."""

    hidden: Tensor | None  # [N, H], zero at tokens that were not computed
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]

    def in_dtypes_of(self, hidden: Tensor, head: LMHead) -> HeadGrads:
        """Each in the dtype of its input, and the first also in its shape."""
        d_hidden, d_weight, d_bias = self
        return HeadGrads(
            None if d_hidden is None else d_hidden.to(hidden.dtype).reshape(hidden.shape),
            None if d_weight is None else d_weight.to(head.weight.dtype),
            None if d_bias is None or head.bias is None else d_bias.to(head.bias.dtype),
        )


def empty_grads(hidden: Tensor, head: LMHead, needs: Needs, *, saved: bool = False) -> HeadGrads:
    """Uninitialised gradients in the dtypes of their inputs, or (`saved`) in the dtypes that a backend returns."""
    d_hidden = hidden.dtype if not saved else saved_dtype(hidden)
    d_weight = head.weight.dtype if not saved else saved_dtype(head.weight)
    d_bias = None if head.bias is None else head.bias.dtype if not saved else stats_dtype(hidden, head.weight)
    return HeadGrads(
        hidden.new_empty(hidden.shape, dtype=d_hidden) if needs.hidden else None,
        head.weight.new_empty(head.weight.shape, dtype=d_weight) if needs.weight else None,
        head.bias.new_empty(head.bias.shape, dtype=d_bias) if needs.bias and head.bias is not None else None,
    )


def stats_dtype(*inputs: Tensor) -> torch.dtype:
    """The dtype of statistics: fp32, or fp64 when an input is fp64."""
    dtype = torch.float32
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def saved_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a gradient that is still to be multiplied by the incoming one: fp32 for fp16, lest it underflow."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def as_fp32(x: Tensor) -> Tensor:
    """Contiguous, fp32 and detached, as compiled kernels read per-token values."""
    return x.detach().float().contiguous()


def indices_of(keep: Tensor) -> Tensor | None:  # [N] bool -> [n] or None
    """The indices of the true values, or None if all are true.

    The host waits for the GPU once, for their count; `nonzero` would make it wait once more.
    """
    total, count = keep.numel(), int(keep.sum())
    if count == total:
        return None
    place = torch.where(keep, keep.cumsum(0) - 1, count)  # false ones all go to one slot beyond the last
    rows = place.new_empty(count + 1).scatter_(0, place, torch.arange(total, device=keep.device))
    return rows[:count]


def gather_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """The values of the computed tokens; all values if `rows` is None."""
    return values if rows is None else values.index_select(0, rows)


def group_name(group: object) -> str:
    """The name by which a group passes through an op of torch.library, which takes no objects; "" is no group."""
    if group is None:
        return ""
    if not isinstance(group, ProcessGroup):
        hint = "of a DeviceMesh that is mesh.get_group()"
        raise ValueError(f"group is a {type(group).__name__}, needs a torch.distributed.ProcessGroup or None; {hint}")
    name: str = group.group_name
    return name


def group_named(name: str) -> ProcessGroup | None:
    if not name:
        return None
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    group: ProcessGroup = resolve(name)
    return group


def shard_range(head: LMHead) -> tuple[int, int]:
    """(first vocab id of this rank's shard, V over all ranks). Shards lie in rank order and may differ in size."""
    rows = int(head.weight.shape[0])
    if head.group is None:
        return 0, rows
    counts = [int(size) for size in gather_over(torch.tensor([rows], device=head.weight.device), head.group)]
    return sum(counts[: dist.get_rank(head.group)]), sum(counts)


def gather_over(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's tensor, in rank order; all have the same shape."""
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
