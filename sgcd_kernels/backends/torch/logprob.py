"""log p(y), entropy and log-sum-exp, and their gradients, one block of logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.backends.torch.blocks import TokenBlock, plan
from sgcd_kernels.backends.torch.gradients import sweep_gradients
from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection, shard_range, sum_over
from sgcd_kernels.core.statistics import MIN_EXPONENT, HeadStats, LogprobValues, minus_lse


def logprob_forward(
    x: Projection, targets: Tensor, cache_for: Needs | None = None
) -> tuple[LogprobValues, None]:  # nothing is cached: logits are recomputed block by block
    offset, _ = shard_range(x.head)
    blocks = plan(x, live=3, hidden_copies=1, weight_copies=1)
    out = x.hidden.new_empty((len(LogprobValues._fields), x.num_rows), dtype=x.stats_dtype)
    for tokens in blocks.of_tokens():
        block, y = TokenBlock.of(x, tokens), targets[tokens]
        stats = HeadStats.start(y.numel(), out)
        for vocab in blocks.of_vocab():
            z = block.logits(vocab)
            stats, _, _ = stats.with_targets(z, y, offset + vocab.start).updated(z)
        stats, _ = stats.merged(x.head.group)
        for field, value in zip(out, stats.results(), strict=True):
            field[tokens] = value
    return LogprobValues(*out.unbind(0)), None


def logprob_backward(
    x: Projection,
    targets: Tensor,
    values: LogprobValues,
    upstream: LogprobValues,
    needs: Needs,
    cached: None = None,
) -> HeadGrads:
    offset, _ = shard_range(x.head)
    lse, entropy, d_entropy = values.lse, values.entropy, upstream.entropy
    assert lse is not None
    d_logp = torch.zeros_like(lse) if upstream.logp is None else upstream.logp
    scale = -d_logp if upstream.lse is None else upstream.lse - d_logp

    def logit_grad(tokens: slice, vocab: slice, z: Tensor) -> Tensor:
        low = None if values.lse_low is None else values.lse_low[tokens]
        log_p = minus_lse(z, lse[tokens], low).clamp_(min=MIN_EXPONENT)
        local = targets[tokens] - (offset + vocab.start)
        inside = ((local >= 0) & (local < z.shape[1])).nonzero().squeeze(1)
        cells = inside, local[inside]
        dz = log_p.exp()
        p, below_one = dz[cells], log_p[cells].expm1()  # of the targets
        if entropy is None or d_entropy is None:
            dz.mul_(scale[tokens].unsqueeze(1))
        else:
            inner = log_p.add_(entropy[tokens].unsqueeze(1)).mul_(d_entropy[tokens].unsqueeze(1))
            dz.mul_(inner.neg_().add_(scale[tokens].unsqueeze(1)))
        d = d_logp[tokens][inside]
        dz[cells] = (
            dz[cells] + p * d
        ) - below_one * d  # p slope + d, but 1 - p is not rounding error where p is near 1
        return dz

    return sweep_gradients(x, plan(x, live=5, hidden_copies=2, weight_copies=3), needs, logit_grad)


def target_logp(x: Projection, targets: Tensor, lse: Tensor, lse_low: Tensor | None) -> Tensor:  # [n]
    head, dtype = x.head, x.stats_dtype
    out = lse.new_empty(x.num_rows, dtype=dtype)
    local = x.local_targets(targets)
    inside, local = (local >= 0) & (local < x.vocab), local.clamp(0, x.vocab - 1)
    for tokens in plan(x, live=1, hidden_copies=3, weight_copies=0).of_tokens():
        block, ids = TokenBlock.of(x, tokens), local[tokens]
        weight = head.weight[ids].to(block.hidden.dtype).to(dtype)
        z = (block.hidden.to(dtype) * weight).sum(1, keepdim=True)
        if head.bias is not None:
            z += head.bias[ids].to(z.dtype).unsqueeze(1)
        z = block.transformed(z).squeeze(1)
        out[tokens] = sum_over(torch.where(inside[tokens], z, 0.0), head.group)
    return minus_lse(out.unsqueeze(1), lse, lse_low).squeeze(1)
