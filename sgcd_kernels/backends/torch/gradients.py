"""The gradient sweep of log-probs and distillation, which differ only in the formula of a block's logit gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sgcd_kernels.backends.torch.blocks import Blocks, TokenBlock, product
from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection, saved_dtype, sum_over

# (token range, vocab range, logits [t, v]) -> gradient of the loss with respect to those logits [t, v]
LogitGrad = Callable[[slice, slice, Tensor], Tensor]


def sweep_gradients(x: Projection, blocks: Blocks, needs: Needs, logit_grad: LogitGrad) -> HeadGrads:
    """Recompute the logits block by block, and backpropagate their gradient to hidden, weight and bias."""
    head, device, dtype = x.head, x.hidden.device, x.stats_dtype
    d_hidden = torch.zeros(x.hidden.shape, dtype=dtype, device=device) if needs.hidden else None
    d_weight = torch.zeros_like(head.weight, dtype=saved_dtype(head.weight)) if needs.weight else None
    d_bias = torch.zeros_like(head.bias, dtype=dtype) if needs.bias and head.bias is not None else None
    for vocab in blocks.of_vocab():
        d_block = None
        for tokens in blocks.of_tokens():
            block = TokenBlock.of(x, tokens)
            weight = block.weight(vocab)
            z = block.logits(vocab, weight)
            dz = block.transform_backward(z, logit_grad(tokens, vocab, z))
            del z
            if d_hidden is not None:
                _add_rows(d_hidden, block, product(dz, weight))
            if d_weight is not None:
                d_block = torch.zeros(weight.shape, dtype=dtype, device=device) if d_block is None else d_block
                _add_product(d_block, dz.t(), block.hidden)
            if d_bias is not None:
                d_bias[vocab] += dz.sum(0, dtype=dtype)
        if d_weight is not None and d_block is not None:
            d_weight[vocab] = d_block
    if d_hidden is not None:
        d_hidden = sum_over(d_hidden, head.group).to(saved_dtype(x.hidden))
    return HeadGrads(d_hidden, d_weight, d_bias)


def _add_rows(total: Tensor, block: TokenBlock, values: Tensor) -> None:
    if isinstance(block.index, Tensor):
        total.index_add_(0, block.index, values)
    else:
        total[block.index] += values


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += product(a, b)
