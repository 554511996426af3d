"""Cutting the [n, V] logits into blocks that fit a fixed budget, and computing one block.

Forward passes walk token blocks outside and vocabulary blocks inside, so all running statistics are local. Gradient
passes walk the vocabulary outside: a slice of the weight's gradient is then summed over all tokens in full precision
and written once, and only the hidden gradient accumulates (in fp32) across slices.

Logits are never rounded to half precision. On a CPU half operands are widened before the product; on CUDA a bf16
product is accumulated and returned in fp32 by the library. fp16 is widened everywhere: gradients would underflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sgcd_kernels.types import Projection

WORKSPACE_BYTES = {
    "cpu": 64 << 20,
    "cuda": 256 << 20,
}  # blocks and copies alive at one time
MAX_TOKENS = 1024


@dataclass(frozen=True)
class Blocks:
    """The cut: `tokens` x `words` at a time."""

    num_tokens: int
    num_words: int
    tokens: int
    words: int

    def token_ranges(self) -> Iterator[tuple[int, int]]:
        return _ranges(self.num_tokens, self.tokens)

    def word_ranges(self) -> Iterator[tuple[int, int]]:
        return _ranges(self.num_words, self.words)


def _ranges(total: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, total)) for start in range(0, total, step))


def plan(projections: tuple[Projection, ...], live: int, *, row_copies: int, word_copies: int) -> Blocks:
    """Choose block sizes for `live` [tokens, words] temporaries, and so many copies of [tokens, H] and [words, H]."""
    first = projections[0]
    n, vocab = first.num_rows, first.weight.shape[0]
    width = sum(p.hidden.shape[1] for p in projections)
    device = first.hidden.device.type
    # An eighth is kept for what the library packs inside a product.
    widest = max(p.stats_dtype.itemsize for p in projections)  # a pair's blocks have the wider head's dtype
    budget = WORKSPACE_BYTES.get(device, WORKSPACE_BYTES["cuda"]) * 7 // 8 // widest
    # Half of it bounds the tokens, with room for 256 words. V has no say: ranks with unequal shards must agree.
    tokens = max(1, min(n, MAX_TOKENS, budget // 2 // (row_copies * width + live * 256)))
    words = (budget - row_copies * tokens * width) // (live * tokens + word_copies * width)
    words = max(64, words // 64 * 64)
    return Blocks(n, vocab, tokens, min(words, vocab))


def operand_dtype(p: Projection) -> torch.dtype:
    """bf16 where the library multiplies bf16 into fp32, else the dtype of the statistics.

    An fp32 head under bf16 hidden states is a master weight under autocast: it is rounded block by block as autocast
    would do at once. In fp32 the products would cost some 15 times as much.
    """
    native = p.hidden.device.type == "cuda" and p.hidden.dtype == torch.bfloat16
    return torch.bfloat16 if native and p.weight.dtype in (torch.bfloat16, torch.float32) else p.stats_dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in fp32 when the operands are bf16."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else torch.mm(a, b)


@dataclass(frozen=True)
class Rows:
    """One block of tokens of a projection, ready to be multiplied."""

    x: Tensor  # [t, H]
    temperature: float | Tensor  # or [t, 1]
    index: Tensor | slice  # where the block sits among all N tokens


def load_rows(p: Projection, start: int, stop: int) -> Rows:
    index: Tensor | slice = slice(start, stop) if p.rows is None else p.rows[start:stop]
    temperature = p.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature[index].to(p.stats_dtype).unsqueeze(1)
    # Contiguous, because a product's last bit may depend on strides, and equal heads must give equal logits.
    return Rows(p.hidden[index].to(operand_dtype(p)).contiguous(), temperature, index)


def load_words(p: Projection, start: int, stop: int) -> Tensor:  # [w, H]
    return p.weight[start:stop].to(operand_dtype(p)).contiguous()


def block_logits(p: Projection, rows: Rows, words: Tensor, start: int, stop: int) -> Tensor:  # [t, w]
    """The final logits of one block, in the dtype of the statistics."""
    z = product(rows.x, words.t())
    if p.bias is not None:
        z += p.bias[start:stop].to(z.dtype)
    return finish_logits(p, z, rows.temperature)


def finish_logits(p: Projection, z: Tensor, temperature: float | Tensor) -> Tensor:
    """Softcap, then temperature, in place."""
    if p.softcap is not None:
        z.div_(p.softcap).tanh_().mul_(p.softcap)
    if isinstance(temperature, Tensor) or temperature != 1.0:
        z.div_(temperature)
    return z


def logit_grad_to_product(p: Projection, rows: Rows, z: Tensor, dz: Tensor) -> Tensor:
    """Carry a gradient of the final logits `z` back through temperature and softcap, in place on both."""
    if p.softcap is not None:
        slope = z.mul_(rows.temperature).div_(p.softcap).square_().neg_().add_(1)
        dz.mul_(slope)
    if isinstance(rows.temperature, Tensor) or rows.temperature != 1.0:
        dz.div_(rows.temperature)
    return dz.to(operand_dtype(p))
