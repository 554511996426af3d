"""The gradient sweep: one vocab chunk at a time, one kernel and two library products.

The kernel makes a chunk's logits again and writes their gradient dZ [tokens, chunk] in the operands' dtype. Then
dX += dZ W_chunk, summed in fp32, and dW_chunk = dZ^T X, one product over all tokens of a token chunk, rounded once and
written once. There is one token chunk where hidden's fp32 sum fits into half the budget; each further one is another
addition (and, in half precision, another rounding) into dW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sgcd_kernels.backends.triton.launch import ceil_div, operand_dtype
from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection, gather_rows, saved_dtype, sum_over

# (first vocab id, dZ [tokens, chunk] to be filled)
Write = Callable[[int, Tensor], None]
# (the head on a chunk of its tokens, which of them) -> what fills dZ of these: it differs by loss
Writer = Callable[[Projection, slice], Write]

WORKSPACE_BYTES = 256 << 20
VOCAB_MULTIPLE = 256
MAX_VOCAB_CHUNK = 16_384  # beyond it products gain nothing
TOKEN_MULTIPLE = 128  # what is per token begins on sixteen bytes in every chunk, so that none compiles kernels anew
ROW_MULTIPLE = 16  # numbers from row to row of dZ: kernels and library write and read sixteen bytes at a time
LARGEST_FP16 = 64.0  # where the largest fp16 coefficient is brought by the loss scale: far from 65,504, far from 6e-8


@dataclass(frozen=True)
class Plan:
    """Tokens and vocab ids whose dZ is held at one time."""

    tokens: int
    vocab: int

    def bytes(self, width: int, itemsize: int, weight_cast: bool) -> int:
        """Held beside inputs and gradients: dX in fp32, a copy of hidden, dZ, and a chunk of weight if that is cast."""
        weight_copy = self.vocab * width * itemsize if weight_cast else 0
        return self.tokens * (width * (4 + itemsize) + row_stride(self.vocab) * itemsize) + weight_copy


def row_stride(vocab: int) -> int:
    return ceil_div(vocab, ROW_MULTIPLE) * ROW_MULTIPLE


def plan(n: int, width: int, vocab: int, itemsize: int, weight_cast: bool = False) -> Plan:
    """The longest vocab chunks that keep to the budget, beside token chunks that leave them about half of it."""
    token_chunks = max(1, ceil_div(n * width * (4 + itemsize), WORKSPACE_BYTES // 2))
    tokens = ceil_div(max(1, ceil_div(n, token_chunks)), TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    tokens = max(1, min(n, tokens))
    left = WORKSPACE_BYTES - tokens * width * (4 + itemsize)
    chunk = left // ((tokens + (width if weight_cast else 0)) * itemsize)
    chunk = max(VOCAB_MULTIPLE, min(chunk, MAX_VOCAB_CHUNK, vocab) // VOCAB_MULTIPLE * VOCAB_MULTIPLE)
    return Plan(tokens, min(chunk, vocab))


def loss_scale_of(x: Projection, coefficients: list[Tensor]) -> Tensor | None:
    """A power of two that keeps gradients of logits from underflowing in fp16; None for other operands."""
    if operand_dtype(x) != torch.float16 or x.num_rows == 0:
        return None
    largest = torch.stack([c.abs().amax() for c in coefficients]).amax()
    return torch.where(largest > 0, LARGEST_FP16 / largest, 1.0).log2().floor().exp2()


def sweep_gradients(x: Projection, needs: Needs, writer: Writer, loss_scale: Tensor | None = None) -> HeadGrads:
    """Gradients of hidden, weight and bias from those of the logits; all of them divided by the loss scale."""
    operand, device, head = operand_dtype(x), x.hidden.device, x.head
    n, width, vocab = x.num_rows, x.hidden.shape[1], x.vocab
    chunk = plan(n, width, vocab, operand.itemsize, head.weight.dtype != operand)
    d_hidden = torch.zeros(x.hidden.shape, dtype=saved_dtype(x.hidden), device=device) if needs.hidden else None
    fresh = torch.empty_like if n else torch.zeros_like  # the first token chunk writes every row
    d_weight = fresh(head.weight, dtype=saved_dtype(head.weight)) if needs.weight else None
    d_bias = torch.zeros_like(head.bias, dtype=torch.float32) if needs.bias and head.bias is not None else None
    buffer = torch.empty((chunk.tokens, row_stride(chunk.vocab)), dtype=operand, device=device)
    for tokens in slices(n, chunk.tokens):
        part = x[tokens]
        write = writer(part, tokens)
        hidden = gather_rows(part.hidden.detach(), part.rows).to(operand)
        dx = torch.zeros(hidden.shape, dtype=torch.float32, device=device) if d_hidden is not None else None
        for ids in slices(vocab, chunk.vocab):
            dz = buffer[: hidden.shape[0], : ids.stop - ids.start]
            write(ids.start, dz)
            if dx is not None:
                add_product(dx, dz, head.weight[ids].detach().to(operand))
            if d_weight is not None:
                add_product(d_weight[ids], dz.t(), hidden, accumulate=tokens.start > 0)
            if d_bias is not None:
                d_bias[ids] += dz.sum(0, dtype=torch.float32)
        del hidden  # `store_rows` makes as much
        if dx is not None and d_hidden is not None:
            store_rows(d_hidden, sum_over(dx, head.group), tokens, part.rows)
        del dx  # before the next chunk's
    if loss_scale is not None:
        for grad in (d_hidden, d_weight, d_bias):
            if grad is not None:
                grad.div_(loss_scale)
    return HeadGrads(d_hidden, d_weight, d_bias)


def slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def store_rows(total: Tensor, values: Tensor, tokens: slice, rows: Tensor | None) -> None:
    """Write the gradient of a chunk's tokens where they lie in hidden."""
    if rows is None:
        total[tokens] = values
    else:
        total.index_copy_(0, rows, values.to(total.dtype))


def add_product(total: Tensor, a: Tensor, b: Tensor, accumulate: bool = True) -> None:
    """total += a b, or total = a b: summed in fp32 and rounded once to total's dtype.

    Half operands with an fp32 total are one library call on CUDA: `addmm` takes them since PyTorch 2.10 (its pull
    request 167931), except where TunableOp is on. A total of one row or column PyTorch would take for a bias and hand
    to cuBLASLt: that path is not relied on.
    """
    if a.device.type == "cpu":  # which has no product of halves with an fp32 result
        a, b = a.float(), b.float()
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=int(accumulate), out=total)
    elif a.dtype.itemsize > total.dtype.itemsize:
        total.copy_(total.float().addmm_(a, b) if accumulate else a @ b)
    elif accumulate and 1 in total.shape:
        total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        torch.addmm(total, a, b, beta=int(accumulate), out_dtype=torch.float32, out=total)
