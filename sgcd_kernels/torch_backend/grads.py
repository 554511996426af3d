"""The gradient walk shared by log-probs and distillation: only the formula of a block's logit gradient differs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.shard import sum_over
from sgcd_kernels.torch_backend.blocks import (
    Blocks,
    Rows,
    block_logits,
    load_rows,
    load_words,
    logit_grad_to_product,
    product,
)
from sgcd_kernels.types import Projection, ProjectionGrads
from sgcd_kernels.types import saved_dtype as saved_dtype

Needs = tuple[bool, bool, bool]  # hidden, weight, bias
# (token range, word range, logits [t, w]) -> gradient of the loss in those logits [t, w]
LogitGrad = Callable[[tuple[int, int], tuple[int, int], Tensor], Tensor]


def walk_gradients(
    p: Projection, blocks: Blocks, needs: Needs, logit_grad: LogitGrad, group: ProcessGroup | None = None
) -> ProjectionGrads:
    """Recompute the logits block by block and multiply their gradient into those of hidden, weight and bias."""
    device = p.hidden.device
    d_hidden = torch.zeros(p.hidden.shape, dtype=p.stats_dtype, device=device) if needs[0] else None
    d_weight = torch.zeros_like(p.weight, dtype=saved_dtype(p.weight)) if needs[1] else None
    d_bias = torch.zeros_like(p.bias, dtype=p.stats_dtype) if needs[2] and p.bias is not None else None
    for start, stop in blocks.word_ranges():
        words = load_words(p, start, stop)
        slice_grad = torch.zeros(words.shape, dtype=p.stats_dtype, device=device) if needs[1] else None
        for t0, t1 in blocks.token_ranges():
            rows = load_rows(p, t0, t1)
            z = block_logits(p, rows, words, start, stop)
            dz = logit_grad_to_product(p, rows, z, logit_grad((t0, t1), (start, stop), z))
            del z
            if d_hidden is not None:
                _add_rows(d_hidden, rows, product(dz, words))
            if slice_grad is not None:
                _add_product(slice_grad, dz.t(), rows.x)
            if d_bias is not None:
                d_bias[start:stop] += dz.sum(0, dtype=p.stats_dtype)
        if d_weight is not None and slice_grad is not None:
            d_weight[start:stop] = slice_grad
    if d_hidden is not None:
        d_hidden = sum_over(d_hidden, group).to(saved_dtype(p.hidden))
    return ProjectionGrads(d_hidden, d_weight, d_bias)


def _add_rows(total: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows.index, Tensor):
        total.index_add_(0, rows.index, values)
    else:
        total[rows.index] += values


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += product(a, b)
