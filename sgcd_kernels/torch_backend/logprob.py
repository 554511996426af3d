"""log p(y), entropy and log-sum-exp, and their gradients, one block of logits at a time.

Per row the running statistics are m = max z, Z = sum e^{z-m} and S = sum e^{z-m} (z - m); a new maximum m' rescales
them as Z <- e^{m-m'} Z and S <- e^{m-m'} (S + (m - m') Z). Then lse = m + ln Z and entropy = ln Z - S / Z.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.shard import max_over, shard_range, sum_over
from sgcd_kernels.torch_backend.blocks import block_logits, finish_logits, load_rows, load_words, plan
from sgcd_kernels.torch_backend.grads import Needs, walk_gradients
from sgcd_kernels.types import Logprobs, Projection, ProjectionGrads

FLOOR = -1e4  # e^FLOOR is 0 in every dtype, and 0 * FLOOR is 0 where 0 * -inf would be NaN


class RowStats:
    """Running (m, Z, S) and the target's logit of t rows."""

    m: Tensor  # [t], the maximum so far
    z: Tensor  # [t], sum e^{z - m}
    s: Tensor  # [t], sum e^{z - m} (z - m)
    target: Tensor  # [t], the target's logit

    def __init__(self, tokens: int, like: Tensor) -> None:
        self.m = like.new_full((tokens,), torch.finfo(like.dtype).min)  # not -inf: e^{-inf - m} must be 0, not NaN
        self.z = like.new_zeros(tokens)
        self.s = like.new_zeros(tokens)
        self.target = like.new_zeros(tokens)

    def rescale(self, m: Tensor) -> Tensor:
        """Move to the maximum `m` >= self.m; give the shift of exponents, by whose exp all sums shrink."""
        shift = torch.where(self.z > 0, self.m - m, 0.0)  # before the first block there is nothing to shift
        shrink = shift.exp()
        self.s = shrink * torch.where(self.z > 0, self.s + shift * self.z, self.s)
        self.z = shrink * self.z
        self.m = m
        return shift

    def fold(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Fold a block in; give e^{z-m} of the block and the shift of the older exponents."""
        shift = self.rescale(torch.maximum(self.m, logits.amax(1)))
        centred = (logits - self.m.unsqueeze(1)).clamp_(min=FLOOR)
        e = centred.exp()
        self.z = self.z + e.sum(1)
        self.s = self.s + centred.mul_(e).sum(1)
        return e, shift

    def pick_target(self, logits: Tensor, targets: Tensor, first_word: int) -> None:
        """Remember the target's logit if it lies in this block."""
        local = targets - first_word
        inside = (local >= 0) & (local < logits.shape[1])
        picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        self.target = torch.where(inside, picked, self.target)

    def merge(self, group: ProcessGroup | None) -> Tensor | None:
        """Combine with the other ranks' shards; give the shift of its own exponents."""
        if group is None:
            return None
        shift = self.rescale(max_over(self.m, group))
        self.z, self.s, self.target = (sum_over(x.contiguous(), group) for x in (self.z, self.s, self.target))
        return shift

    def normalise(self, logits: Tensor) -> Tensor:
        """Log-probs of a block, in place. In two steps: at large logits one rounded lse would cost digits."""
        return logits.sub_(self.m.unsqueeze(1)).sub_(self.z.log().unsqueeze(1))

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log p(y), entropy, lse)"""
        log_z = self.z.log()
        entropy = (log_z - self.s / self.z).clamp(min=0)
        return (self.target - self.m) - log_z, entropy, self.m + log_z


def logprob_forward(
    p: Projection,
    targets: Tensor,  # [n]
    group: ProcessGroup | None = None,
    keep: Needs | None = None,  # nothing is kept: logits are made again in blocks
) -> Logprobs:
    """Of the computed rows."""
    offset, _ = shard_range(p.weight, group)
    blocks = plan((p,), 3, row_copies=1, word_copies=1)
    out = p.hidden.new_empty((3, p.num_rows), dtype=p.stats_dtype)
    for t0, t1 in blocks.token_ranges():
        rows = load_rows(p, t0, t1)
        stats = RowStats(t1 - t0, out)
        for start, stop in blocks.word_ranges():
            z = block_logits(p, rows, load_words(p, start, stop), start, stop)
            stats.pick_target(z, targets[t0:t1], offset + start)
            stats.fold(z)
        stats.merge(group)
        out[0, t0:t1], out[1, t0:t1], out[2, t0:t1] = stats.results()
    return Logprobs(*out.unbind(0))


def logprob_backward(
    p: Projection,
    targets: Tensor,  # [n]
    lse: Tensor,  # [n]
    d_logp: Tensor,  # [n]
    needs: Needs,
    entropy: Tensor | None = None,  # [n], with d_entropy
    d_entropy: Tensor | None = None,  # [n]
    d_lse: Tensor | None = None,  # [n]
    group: ProcessGroup | None = None,
    kept: None = None,
) -> ProjectionGrads:
    """Gradients of sum(d_logp logp + d_entropy entropy + d_lse lse).

    In a logit: d_logp (1[v = y] - p) + d_lse p - d_entropy p (ln p + entropy).
    """
    offset, _ = shard_range(p.weight, group)
    blocks = plan((p,), 5, row_copies=2, word_copies=3)
    scale = -d_logp if d_lse is None else d_lse - d_logp

    def logit_grad(tokens: tuple[int, int], words: tuple[int, int], z: Tensor) -> Tensor:
        at = slice(*tokens)
        log_p = (z - lse[at].unsqueeze(1)).clamp_(min=FLOOR)
        dz = log_p.exp()
        if entropy is None or d_entropy is None:
            dz.mul_(scale[at].unsqueeze(1))
        else:
            inner = log_p.add_(entropy[at].unsqueeze(1)).mul_(d_entropy[at].unsqueeze(1))
            dz.mul_(inner.neg_().add_(scale[at].unsqueeze(1)))
        local = targets[at] - (offset + words[0])
        inside = ((local >= 0) & (local < z.shape[1])).nonzero().squeeze(1)
        dz[inside, local[inside]] += d_logp[at][inside]
        return dz

    return walk_gradients(p, blocks, needs, logit_grad, group)


def target_logp(
    p: Projection,
    targets: Tensor,  # [n]
    lse: Tensor,  # [n]
    group: ProcessGroup | None = None,
) -> Tensor:  # [n]
    """log p(y) when the normaliser is already known: one dot product a token."""
    offset, _ = shard_range(p.weight, group)
    blocks = plan((p,), 1, row_copies=3, word_copies=0)
    out = lse.new_empty(p.num_rows, dtype=p.stats_dtype)
    for t0, t1 in blocks.token_ranges():
        rows = load_rows(p, t0, t1)
        local = targets[t0:t1] - offset
        inside = (local >= 0) & (local < p.weight.shape[0])
        local = local.clamp(0, p.weight.shape[0] - 1)
        z = (rows.x.to(p.stats_dtype) * p.weight[local].to(rows.x.dtype).to(p.stats_dtype)).sum(1, keepdim=True)
        if p.bias is not None:
            z += p.bias[local].to(z.dtype).unsqueeze(1)
        z = finish_logits(p, z, rows.temperature).squeeze(1)
        out[t0:t1] = sum_over(torch.where(inside, z, 0.0), group)
    return out - lse
