"""What the bodies of the ops share: a head on the tokens that count, and gradients in the shapes that are promised."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.shard import shard_range
from sgcd_kernels.types import Projection, ProjectionGrads
from sgcd_kernels.validation import flat_targets, kept_rows, positive_temperature, take


def stats_dtype(*inputs: Tensor) -> torch.dtype:
    """fp32, or fp64 when an input is fp64."""
    dtype = torch.float32
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    rows: Tensor | None,
) -> Projection:
    tau = positive_temperature(temperature, temperatures)
    return Projection(hidden.reshape(-1, hidden.shape[-1]), weight, bias, tau, softcap, rows)


def on_rows(p: Projection, rows: Tensor | None) -> Projection:
    """The same head on some of the tokens."""
    return Projection(p.hidden, p.weight, p.bias, p.temperature, p.softcap, rows)


def on_targets(
    p: Projection, targets: Tensor, ignore_index: int, group: ProcessGroup | None, mask: Tensor | None = None
) -> tuple[Projection, Tensor]:
    """The same head on the tokens that are neither ignored nor masked, and their targets [n]."""
    flat = flat_targets(targets, shard_range(p.weight, group)[1], ignore_index, mask)
    rows = kept_rows(flat != ignore_index)
    return on_rows(p, rows), take(flat, rows)


def place(values: Tensor, rows: Tensor | None, leading: torch.Size) -> Tensor:
    """The results of the computed rows at their tokens, 0 elsewhere: always memory of their own."""
    if rows is None:
        return values.reshape(leading).clone()
    return values.new_zeros(leading.numel()).index_copy_(0, rows, values).reshape(leading)


def three(grads: ProjectionGrads, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden, weight and bias; an op's results are tensors, so an empty one says None."""
    x, w, b = (hidden.new_empty(0) if g is None else g for g in grads)
    return x if grads.hidden is None else x.reshape(hidden.shape), w, b


def three_empty(
    inputs: tuple[Tensor, Tensor, Tensor | None], dtypes: tuple[torch.dtype, ...], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `three` gives, without the numbers."""
    hidden, weight, bias = inputs
    none = hidden.new_empty(0)
    return (
        hidden.new_empty(hidden.shape, dtype=dtypes[0]) if needs[0] else none,
        torch.empty_like(weight, dtype=dtypes[1]) if needs[1] else hidden.new_empty(0),
        torch.empty_like(bias, dtype=dtypes[2]) if needs[2] and bias is not None else hidden.new_empty(0),
    )
