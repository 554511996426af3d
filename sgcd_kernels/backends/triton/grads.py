"""The gradient walk: a slice of the vocabulary at a time, one kernel and two library products.

The kernel makes a slice's logits again and writes their gradient dZ [tokens, slice] in the operands' dtype. Then
dX += dZ W_slice, summed in fp32, and dW_slice = dZ^T X, one product over all tokens of a group, rounded once and
written once. There is one group of tokens where hidden's fp32 sum fits into half the budget; each further group is
another addition (and, in half precision, another rounding) into dW.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.kernel_inputs import part_of
from sgcd_kernels.shard import sum_over
from sgcd_kernels.torch_backend.grads import Needs, saved_dtype
from sgcd_kernels.triton.launch import Write, operand_dtype
from sgcd_kernels.types import Projection, ProjectionGrads
from sgcd_kernels.validation import take

WORKSPACE_BYTES = 256 << 20
SLICE_MULTIPLE = 256  # words
LONGEST_SLICE = 16_384  # words; beyond it products gain nothing
GROUP_MULTIPLE = 128  # tokens: what is per token begins on sixteen bytes in every group, so none compiles kernels anew
ROW_MULTIPLE = 16  # words from row to row of dZ: kernels and library write and read sixteen bytes at a time


class LogitGrad(Protocol):
    """What differs between log-probs and distillation."""

    def writer(self, p: Projection, tokens: slice) -> Write:
        """What fills dZ of a range of the computed tokens, p being the head on these."""


@dataclass(frozen=True)
class Cut:
    """Tokens of a group and words of a slice."""

    tokens: int
    words: int

    def bytes(self, width: int, itemsize: int, weight_cast: bool) -> int:
        """Held beside inputs and gradients: dX in fp32, a copy of hidden, dZ, and a slice of weight if that is cast."""
        slice_copy = self.words * width * itemsize if weight_cast else 0
        return self.tokens * (width * (4 + itemsize) + row_stride(self.words) * itemsize) + slice_copy


def row_stride(words: int) -> int:
    return -(-words // ROW_MULTIPLE) * ROW_MULTIPLE


def cut_of(n: int, width: int, vocab: int, itemsize: int, weight_cast: bool = False) -> Cut:
    """The longest slices that keep to the budget, beside groups that leave them about half of it."""
    groups = max(1, -(-n * width * (4 + itemsize) // (WORKSPACE_BYTES // 2)))
    tokens = -(-max(1, -(-n // groups)) // GROUP_MULTIPLE) * GROUP_MULTIPLE
    tokens = max(1, min(n, tokens))
    left = WORKSPACE_BYTES - tokens * width * (4 + itemsize)
    words = left // ((tokens + (width if weight_cast else 0)) * itemsize)
    words = max(SLICE_MULTIPLE, min(words, LONGEST_SLICE, vocab) // SLICE_MULTIPLE * SLICE_MULTIPLE)
    return Cut(tokens, min(words, vocab))


def walk(
    p: Projection,
    logit_grad: LogitGrad,
    needs: Needs,
    lift: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> ProjectionGrads:
    """Gradients of hidden, weight and bias, as the logits' gradient says; all of them divided by `lift`."""
    operand, device = operand_dtype(p), p.hidden.device
    (n, width), vocab = (p.num_rows, p.hidden.shape[1]), p.weight.shape[0]
    cut = cut_of(n, width, vocab, operand.itemsize, p.weight.dtype != operand)
    d_hidden = torch.zeros(p.hidden.shape, dtype=saved_dtype(p.hidden), device=device) if needs[0] else None
    made = torch.empty_like if n else torch.zeros_like  # the first group writes every word's row
    d_weight = made(p.weight, dtype=saved_dtype(p.weight)) if needs[1] else None
    d_bias = torch.zeros_like(p.bias, dtype=torch.float32) if needs[2] and p.bias is not None else None
    buffer = torch.empty((cut.tokens, row_stride(cut.words)), dtype=operand, device=device)
    for tokens in ranges(n, cut.tokens):
        part = part_of(p, tokens)
        write = logit_grad.writer(part, tokens)
        x = take(part.hidden.detach(), part.rows).to(operand)
        dx = torch.zeros(x.shape, dtype=torch.float32, device=device) if d_hidden is not None else None
        for words in ranges(vocab, cut.words):
            dz = buffer[: x.shape[0], : words.stop - words.start]
            write(words.start, dz)
            if dx is not None:
                add_product(dx, dz, p.weight[words].detach().to(operand))
            if d_weight is not None:
                add_product(d_weight[words], dz.t(), x, again=tokens.start > 0)
            if d_bias is not None:
                d_bias[words] += dz.sum(0, dtype=torch.float32)
        del x  # `place` makes as much
        if dx is not None and d_hidden is not None:
            place(d_hidden, sum_over(dx, group), tokens, part.rows)
        del dx  # before the next group's
    if lift is not None:
        for grad in (d_hidden, d_weight, d_bias):
            if grad is not None:
                grad.div_(lift)
    return ProjectionGrads(d_hidden, d_weight, d_bias)


def ranges(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def place(total: Tensor, values: Tensor, tokens: slice, rows: Tensor | None) -> None:
    """Write the gradient of a group's tokens where they lie in hidden."""
    if rows is None:
        total[tokens] = values
    else:
        total.index_copy_(0, rows, values.to(total.dtype))


def add_product(total: Tensor, a: Tensor, b: Tensor, again: bool = True) -> None:
    """total += a b, or total = a b: summed in fp32 and rounded once to total's dtype.

    Half operands with an fp32 total are one library call on CUDA: `addmm` takes them since PyTorch 2.10 (its pull
    request 167931), except where TunableOp is on. A total of one row or column PyTorch would take for a bias and hand
    to cuBLASLt: that path is not relied on.
    """
    if a.device.type == "cpu":  # which has no product of halves with an fp32 result
        a, b = a.float(), b.float()
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=int(again), out=total)
    elif a.dtype.itemsize > total.dtype.itemsize:
        total.copy_(total.float().addmm_(a, b) if again else a @ b)
    elif again and 1 in total.shape:
        total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        torch.addmm(total, a, b, beta=int(again), out_dtype=torch.float32, out=total)
