"""Divergences of two heads over one vocabulary, block by block: formulas in `sgcd_kernels.linear_divergence`."""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.backends.protocol import DivergenceOptions
from sgcd_kernels.backends.torch.blocks import Blocks, TokenBlock, plan
from sgcd_kernels.core.lm_head import Projection, shard_range, sum_over
from sgcd_kernels.core.statistics import MixtureSums, PairStats, TeacherTopK

Pair = tuple[Tensor, Tensor]  # student's, teacher's


def divergence_forward(
    student: Projection, teacher: Projection, targets: Tensor, options: DivergenceOptions
) -> dict[str, Tensor]:
    group, top_k = student.head.group, options.top_k
    offset, _ = shard_range(student.head)
    blocks = pair_plan(student, teacher)
    parts = []
    for tokens in blocks.of_tokens():
        pair, y = _PairBlock.of(student, teacher, tokens), targets[tokens]
        stats, best = PairStats.start(y.numel(), pair.like), None
        for vocab in blocks.of_vocab():
            z_p, z_q = pair.logits(vocab)
            p, q = (x.with_targets(z, y, offset + vocab.start) for x, z in ((stats.p, z_p), (stats.q, z_q)))
            stats = stats._replace(p=p, q=q).updated(z_p, z_q)
            if top_k is not None:
                block = TeacherTopK.of_block(z_p, z_q, offset + vocab.start, top_k)
                best = block if best is None else best.best_of(block, top_k)
        stats = stats.merged(group)
        part = stats.results()
        if best is not None and top_k is not None:
            best = best.merged(top_k, group)
        if options.features or best is not None:
            part |= _second_pass(pair, blocks, stats, best, y, options, offset)
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def pair_plan(student: Projection, teacher: Projection) -> Blocks:
    return plan(student, teacher, live=8, hidden_copies=2, weight_copies=3)


class _PairBlock:
    """One block of tokens of both heads."""

    def __init__(self, p: TokenBlock, q: TokenBlock, like: Tensor) -> None:
        self.p, self.q = p, q
        self.like = like  # an empty tensor with the dtype and device of the results

    @staticmethod
    def of(student: Projection, teacher: Projection, tokens: slice) -> _PairBlock:
        dtype = torch.promote_types(student.stats_dtype, teacher.stats_dtype)
        like = torch.empty(0, dtype=dtype, device=student.hidden.device)
        return _PairBlock(TokenBlock.of(student, tokens), TokenBlock.of(teacher, tokens), like)

    def logits(self, vocab: slice) -> Pair:
        """Both heads' final logits of a vocab block, in one dtype."""
        return self.p.logits(vocab).to(self.like.dtype), self.q.logits(vocab).to(self.like.dtype)


def _second_pass(
    pair: _PairBlock,
    blocks: Blocks,
    stats: PairStats,
    best: TeacherTopK | None,
    targets: Tensor,
    options: DivergenceOptions,
    offset: int,
) -> dict[str, Tensor]:
    """Fields that need both normalisers, or the teacher's top K, beforehand."""
    jsd, tv, mixture_kl, tail_p, tail_q = (torch.zeros_like(stats.p.l) for _ in range(5))
    for vocab in blocks.of_vocab():
        z_p, z_q = pair.logits(vocab)
        log_p, log_q = stats.p.log_probs(z_p), stats.q.log_probs(z_q)
        if best is not None:
            # Summed, not 1 minus the rest: beside a near-certain token, that would leave only rounding error.
            own = torch.cat([best.ids, targets.unsqueeze(1)], 1) - (offset + vocab.start)
            tail_p += _without(log_p.exp(), own).sum(1)
            tail_q += _without(log_q.exp(), own).sum(1)
        if "tv" in options.features:
            tv += (log_p.exp() - log_q.exp()).abs_().sum(1).mul_(0.5)
        if "jsd" in options.features:
            to_p, to_q = log_mixture_ratios(log_p, log_q, options.beta)
            of_p = log_p.exp_().mul_(to_p).sum(1)
            jsd += (1 - options.beta) * of_p
            mixture_kl += of_p
            jsd += log_q.exp_().mul_(to_q).mul_(options.beta).sum(1)
    jsd, tv, mixture_kl, tail_p, tail_q = (
        sum_over(x, pair.p.head.group) for x in (jsd, tv, mixture_kl, tail_p, tail_q)
    )
    fields = MixtureSums(jsd, tv, mixture_kl).results(options.features)
    return fields if best is None else fields | best.results(stats, targets, tail_p, tail_q)


def _without(probs: Tensor, columns: Tensor) -> Tensor:  # [t, v], [t, k]
    """Set some columns of each row to 0, in place; columns outside the block are ignored."""
    row, at = ((columns >= 0) & (columns < probs.shape[1])).nonzero(as_tuple=True)
    probs[row, columns[row, at]] = 0
    return probs


def log_mixture_ratios(log_p: Tensor, log_q: Tensor, beta: float) -> Pair:
    """ln(p / m) and ln(q / m) for m = beta q + (1 - beta) p; exactly 0 where p = q.

    The log-ratio is clamped at 80 nats: beyond that the smaller of the two adds nothing to any sum.
    """
    delta = log_p - log_q
    delta.masked_fill_(log_p.isneginf() & log_q.isneginf(), 0.0).clamp_(-80, 80)
    to_p = torch.expm1(-delta).mul_(beta).log1p_().neg_()
    to_q = delta.expm1_().mul_(1 - beta).log1p_().neg_()
    return to_p, to_q
