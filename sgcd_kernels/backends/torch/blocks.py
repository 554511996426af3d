"""Splits the [n, V] logits into blocks that fit a fixed budget, and computes one block.

Forward passes loop over token blocks outside and vocab blocks inside, so that all running statistics are local.
Gradient passes loop over vocab blocks outside: a block of the weight's gradient is then summed over all tokens in full
precision and written once, and only the hidden gradient accumulates (in fp32) across blocks.

Logits are never rounded to half precision. On a CPU, half operands are upcast before the product; on CUDA, a bf16
product is accumulated and returned in fp32 by the library. fp16 is upcast everywhere: its gradients would underflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sgcd_kernels.core.lm_head import LMHead, Projection, stats_dtype

WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # blocks and copies alive at one time
MAX_TOKENS = 1024


@dataclass(frozen=True)
class Blocks:
    """`block_n` tokens by `block_v` vocab ids at a time."""

    rows: int
    vocab: int
    block_n: int
    block_v: int

    def of_tokens(self) -> Iterator[slice]:
        return _slices(self.rows, self.block_n)

    def of_vocab(self) -> Iterator[slice]:
        return _slices(self.vocab, self.block_v)


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def plan(*projections: Projection, live: int, hidden_copies: int, weight_copies: int) -> Blocks:
    """Choose block sizes, given how many blocks of logits and copies of a block's operands are alive at one time."""
    first = projections[0]
    width = sum(x.hidden.shape[1] for x in projections)
    widest = max(x.stats_dtype.itemsize for x in projections)  # a pair's blocks have the wider head's dtype
    # An eighth is left for the buffers that the library packs inside a product.
    budget = WORKSPACE_BYTES.get(first.hidden.device.type, WORKSPACE_BYTES["cuda"]) * 7 // 8 // widest
    # Tokens get half of the budget, at 256 vocab ids per block. V does not enter: ranks with unequal shards must agree.
    block_n = max(1, min(first.num_rows, MAX_TOKENS, budget // 2 // (hidden_copies * width + live * 256)))
    block_v = (budget - hidden_copies * block_n * width) // (live * block_n + weight_copies * width)
    block_v = max(64, block_v // 64 * 64)
    return Blocks(first.num_rows, first.vocab, block_n, min(block_v, first.vocab))


def operand_dtype(hidden: Tensor, head: LMHead) -> torch.dtype:
    """bf16 where the library multiplies bf16 into fp32, else the dtype of the statistics.

    An fp32 head with bf16 hidden states is a master weight under autocast. It is rounded block by block, where autocast
    would round all of it at once. Products in fp32 would cost some 15 times as much.
    """
    native = hidden.device.type == "cuda" and hidden.dtype == torch.bfloat16
    mixed = head.weight.dtype in (torch.bfloat16, torch.float32)
    return torch.bfloat16 if native and mixed else stats_dtype(hidden, head.weight)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in fp32 when the operands are bf16."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else torch.mm(a, b)


@dataclass(frozen=True)
class TokenBlock:
    """One block of a projection's tokens, ready to be multiplied."""

    hidden: Tensor  # [t, H] in the dtype of operands
    head: LMHead
    temperature: float | Tensor  # or [t, 1]
    index: Tensor | slice  # of the block's tokens among all N

    @staticmethod
    def of(x: Projection, tokens: slice) -> TokenBlock:
        index: Tensor | slice = tokens if x.rows is None else x.rows[tokens]
        temperature = x.head.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature[index].to(x.stats_dtype).unsqueeze(1)
        # Contiguous: a product's last bit may depend on strides, and equal heads must give equal logits.
        hidden = x.hidden[index].to(operand_dtype(x.hidden, x.head)).contiguous()
        return TokenBlock(hidden, x.head, temperature, index)

    def weight(self, vocab: slice) -> Tensor:  # [v, H]
        """The weight's rows of a vocab block, in the dtype of the operands."""
        return self.head.weight[vocab].to(self.hidden.dtype).contiguous()

    def logits(self, vocab: slice, weight: Tensor | None = None) -> Tensor:  # [t, v]
        """The final logits of a vocab block, in the dtype of the statistics."""
        z = product(self.hidden, (self.weight(vocab) if weight is None else weight).t())
        if self.head.bias is not None:
            z += self.head.bias[vocab].to(z.dtype)
        return self.transformed(z)

    def transformed(self, z: Tensor) -> Tensor:
        """Softcap, then temperature, in place."""
        softcap = self.head.softcap
        if softcap is not None:
            z.div_(softcap).tanh_().mul_(softcap)
        if self.tempered:
            z.div_(self.temperature)
        return z

    def transform_backward(self, z: Tensor, dz: Tensor) -> Tensor:
        """Carry a gradient of the final logits `z` back through temperature and softcap, in place on both."""
        softcap = self.head.softcap
        if softcap is not None:
            dz.mul_(z.mul_(self.temperature).div_(softcap).square_().neg_().add_(1))
        if self.tempered:
            dz.div_(self.temperature)
        return dz.to(self.hidden.dtype)

    @property
    def tempered(self) -> bool:
        return isinstance(self.temperature, Tensor) or self.temperature != 1.0
