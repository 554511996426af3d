"""The statistics that a sweep over the vocabulary collects per row, their merging, and the results computed from them.

Per row, m = max z, l = sum e^{z-m} and s = sum e^{z-m} (z - m); moving to a maximum m' rescales them as
l <- e^{m-m'} l and s <- e^{m-m'} (s + (m - m') l). Then lse = m + ln l and entropy = ln l - s / l. For two heads there
are also A_p = sum e^{z_p-m_p} (z_p - z_q), A_q likewise, and the overlap sum e^{(z_p-m_p)/2 + (z_q-m_q)/2}.

What is kept of l is rest = l - 1, the sum without one vocab id at the maximum: beside that 1, fp32 would lose what a
nearly certain token leaves to the others, and ln l = log1p(rest) with it. For the same reason m + ln l is never rounded
to one number before it is subtracted: the log-sum-exp travels as `lse` and what rounding took from it, `lse_low`.

Records are immutable: every step returns a new one. All backends fill them, so results and merging are written once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.core.lm_head import gather_over, max_over, sum_over

MIN_EXPONENT = -1e4  # e^x is 0 from here on in every dtype, and 0 * x is 0 where 0 * -inf would be NaN

EQUAL = 1e-5  # from 1, within rounding in fp32: the coefficient of distributions whose KLs are 0


class LogprobValues(NamedTuple):
    """Values per computed token [n], or their upstream gradients, where None is 0."""

    logp: Tensor | None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    lse_low: Tensor | None = None  # lse + lse_low is m + ln l to twice the digits; has no gradient of its own


class HeadResults(NamedTuple):
    """The results of a head's statistics, [n]: a `LogprobValues` of which nothing is missing."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    lse_low: Tensor


class HeadStats(NamedTuple):
    """One head's statistics of each row, [n]."""

    m: Tensor  # maximum logit
    rest: Tensor  # l - 1; -1 before the first finite logit
    s: Tensor  # sum e^{z - m} (z - m)
    target: Tensor  # the target's logit

    @staticmethod
    def start(rows: int, like: Tensor) -> HeadStats:
        """Before the first block of logits. m is finite, because e^{-inf - m} must be 0 and not NaN."""
        zeros = like.new_zeros(rows)
        return HeadStats(like.new_full((rows,), torch.finfo(like.dtype).min), zeros - 1, zeros, zeros)

    @staticmethod
    def of_splits(fields: Tensor) -> HeadStats:  # [splits, 4, n]
        """Merge the vocab splits, each given by m, rest, s and the target's logit."""
        return _merge_splits(fields)[0]

    @property
    def l(self) -> Tensor:  # noqa: E743  # as in the literature of online softmax
        """sum e^{z - m}"""
        return self.rest + 1

    @property
    def log_l(self) -> Tensor:
        return self.rest.log1p()

    def rescaled(self, m: Tensor) -> tuple[HeadStats, Tensor, Tensor]:
        """(the same relative to a maximum `m` >= self.m, whether its 1 is left out of `rest`, the shift of exponents)

        Where m is larger, that 1 became e^shift and belongs to the rest.
        """
        filled = self.rest != -1  # also if it is NaN
        shift = torch.where(filled, self.m - m, 0.0)  # before the first block there is nothing to shift
        holds = filled & (shift == 0)
        rest = torch.where(holds, self.rest, self.l * shift.exp())
        s = _shrink(torch.where(filled, self.s + shift * self.l, self.s), shift)
        return HeadStats(m, rest, s, self.target), holds, shift

    def updated(self, logits: Tensor) -> tuple[HeadStats, Tensor, Tensor]:  # [n, block]
        """Online softmax: (statistics with a block of logits added, its e^{z-m}, the shift of the old exponents)"""
        largest, at = logits.max(1, keepdim=True)
        old, held, shift = self.rescaled(torch.maximum(self.m, largest.squeeze(1)))
        centred = (logits - old.m.unsqueeze(1)).clamp_(min=MIN_EXPONENT)
        e = centred.exp()
        top = e.gather(1, at)
        rest = old.rest + e.scatter_(1, at, 0.0).sum(1)  # without the block's largest, which may be the 1
        e.scatter_(1, at, top)
        rest = rest + (top.squeeze(1) + (held.to(e) - 1))  # either is 1, and the other is kept whole
        return old._replace(rest=rest, s=old.s + centred.mul_(e).sum(1)), e, shift

    def with_targets(self, logits: Tensor, targets: Tensor, first: int) -> HeadStats:
        """Take the logits of the targets that lie in this block, which begins at vocab id `first`."""
        local = targets - first
        inside = (local >= 0) & (local < logits.shape[1])
        picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        return self._replace(target=torch.where(inside, picked, self.target))

    def merged(self, group: ProcessGroup | None) -> tuple[HeadStats, Tensor | None]:
        """(statistics over all ranks' shards, the shift of this rank's exponents)"""
        if group is None:
            return self, None
        stats, holds, shift = self.rescaled(max_over(self.m, group))
        rest, s, target, held = sum_over(torch.stack([stats.rest, stats.s, stats.target, holds.to(self.m)]), group)
        return HeadStats(stats.m, rest + (held - 1), s, target), shift

    def log_probs(self, logits: Tensor) -> Tensor:
        """Log-probs of a block, in place. m and ln l are subtracted one by one: a rounded lse would cost digits."""
        return logits.sub_(self.m.unsqueeze(1)).sub_(self.log_l.unsqueeze(1))

    def results(self) -> HeadResults:
        log_l = self.log_l
        entropy = (log_l - self.s / self.l).clamp(min=0)
        lse = self.m + log_l
        # The error of the sum (Knuth's TwoSum); none where the sum is infinite or NaN.
        rounded = lse - self.m
        low = (self.m - (lse - rounded)) + (log_l - rounded)
        return HeadResults((self.target - self.m) - log_l, entropy, lse, torch.where(lse.isfinite(), low, 0.0))


def minus_lse(logits: Tensor, lse: Tensor, low: Tensor | None) -> Tensor:  # [n, block], [n], [n]
    """Log-probs of a block, given the log-sum-exp as two numbers. None stands for 0."""
    log_p = logits - lse.unsqueeze(1)
    return log_p if low is None else log_p.sub_(low.unsqueeze(1))


def _merge_splits(fields: Tensor) -> tuple[HeadStats, Tensor]:  # [splits, 4, n]
    """(one head's statistics, the shift of each split's exponents [splits, n])"""
    m, _, _, target = fields.unbind(1)
    moved, holds, shift = HeadStats(*fields.unbind(1)).rescaled(m.amax(0))
    rest = moved.rest.sum(0) + (holds.sum(0) - 1)
    return HeadStats(m.amax(0), rest, moved.s.sum(0), target.sum(0)), shift


def _shrink(x: Tensor, shift: Tensor) -> Tensor:
    """e^shift x, and 0 where e^shift underflows, also if x is infinite: 0 times inf would be NaN."""
    shrink = shift.exp()
    return torch.where(shrink > 0, x * shrink, 0.0)


class PairStats(NamedTuple):
    """Statistics of each row of the student p and the teacher q, [n]."""

    p: HeadStats
    q: HeadStats
    a_p: Tensor  # sum e^{z_p - m_p} (z_p - z_q)
    a_q: Tensor
    overlap: Tensor

    @staticmethod
    def start(rows: int, like: Tensor) -> PairStats:
        zeros = like.new_zeros(rows)
        return PairStats(HeadStats.start(rows, like), HeadStats.start(rows, like), zeros, zeros, zeros)

    @staticmethod
    def of_fields(fields: Tensor) -> PairStats:  # [11, n]
        """From the fields as a kernel writes them: m, rest, s, target of p, of q, then a_p, a_q, overlap."""
        return PairStats(HeadStats(*fields[:4]), HeadStats(*fields[4:8]), *fields[8:])

    @staticmethod
    def of_splits(fields: Tensor) -> PairStats:  # [splits, 11, n]
        """Merge the vocab splits, each given by its fields in the order of `of_fields`."""
        (p, shift_p), (q, shift_q) = _merge_splits(fields[:, :4]), _merge_splits(fields[:, 4:8])
        a_p, a_q = _shrink(fields[:, 8], shift_p).sum(0), _shrink(fields[:, 9], shift_q).sum(0)
        overlap = (fields[:, 10] * ((shift_p + shift_q) / 2).exp()).sum(0)
        return PairStats(p, q, a_p, a_q, overlap)

    @staticmethod
    def concatenated(parts: Sequence[PairStats]) -> PairStats:
        """Concatenate the statistics of disjoint sets of rows."""
        p, q = (HeadStats(*map(torch.cat, zip(*heads))) for heads in ([x.p for x in parts], [x.q for x in parts]))
        a_p, a_q, overlap = (torch.cat(x) for x in zip(*((part.a_p, part.a_q, part.overlap) for part in parts)))
        return PairStats(p, q, a_p, a_q, overlap)

    def updated(self, z_p: Tensor, z_q: Tensor) -> PairStats:  # [n, block] each
        """Statistics with a block of both heads' logits added; the logits are not modified."""
        p, e_p, shift_p = self.p.updated(z_p)
        q, e_q, shift_q = self.q.updated(z_q)
        old = self._shrunk(shift_p, shift_q)
        # exp of half the exponents, not the root of e_p e_q, which underflows sooner.
        half = (z_p - p.m.unsqueeze(1)).mul_(0.5).add_((z_q - q.m.unsqueeze(1)).mul_(0.5))
        overlap = old.overlap + half.exp_().sum(1)
        delta = torch.sub(z_p, z_q, out=half)
        a_p = old.a_p + torch.where(e_p > 0, delta, 0.0).mul_(e_p).sum(1)  # 0 ln 0 = 0, also where ln is inf
        a_q = old.a_q + torch.where(e_q > 0, delta, 0.0).mul_(e_q).sum(1)
        return PairStats(p, q, a_p, a_q, overlap)

    def _shrunk(self, shift_p: Tensor, shift_q: Tensor) -> PairStats:
        shrink_p, shrink_q = shift_p.exp(), shift_q.exp()
        return self._replace(
            # 0 where the shift underflows, also if the sum is infinite: 0 times inf would be NaN.
            a_p=torch.where(shrink_p > 0, self.a_p * shrink_p, 0.0),
            a_q=torch.where(shrink_q > 0, self.a_q * shrink_q, 0.0),
            overlap=self.overlap * ((shift_p + shift_q) / 2).exp(),  # equal shifts shrink it as they do l
        )

    def merged(self, group: ProcessGroup | None) -> PairStats:
        """With the other ranks' vocabulary."""
        (p, shift_p), (q, shift_q) = self.p.merged(group), self.q.merged(group)
        if shift_p is None or shift_q is None:
            return self
        own = self._shrunk(shift_p, shift_q)
        return PairStats(p, q, *(sum_over(x, group) for x in (own.a_p, own.a_q, own.overlap)))

    def results(self) -> dict[str, Tensor]:
        """The fields of DivergenceStats that take one pass, and `lse_low` of both heads."""
        p, q = self.p.results(), self.q.results()
        # Not lse_p - lse_q: each is rounded at the magnitude of a logit, their difference need not be.
        gap = (self.p.m - self.q.m) + _log_quotient(self.p, self.q)
        reverse_kl = (self.a_p / self.p.l - gap).clamp(min=0)
        forward_kl = (gap - self.a_q / self.q.l).clamp(min=0)
        coefficient = (self.overlap / (self.p.l * self.q.l).sqrt()).clamp(max=1)
        equal = (reverse_kl == 0) & (forward_kl == 0) & (coefficient > 1 - EQUAL)
        return {
            "student_logp": p.logp,
            "teacher_logp": q.logp,
            "student_entropy": p.entropy,
            "teacher_entropy": q.entropy,
            "student_lse": p.lse,
            "teacher_lse": q.lse,
            "student_lse_low": p.lse_low,
            "teacher_lse_low": q.lse_low,
            "reverse_kl": reverse_kl,
            "forward_kl": forward_kl,
            "bhattacharyya": coefficient.masked_fill(equal, 1.0),  # the overlap is not summed in the order of l
        }

    def normalisers(self) -> Tensor:  # [4, n]
        """Inputs of a second pass: m and ln l of the student, then of the teacher."""
        return torch.stack([self.p.m, self.p.log_l, self.q.m, self.q.log_l])


def _log_quotient(p: HeadStats, q: HeadStats) -> Tensor:
    """ln(l_p / l_q), accurate relative to itself also where both are nearly 1."""
    near = (p.rest - q.rest) / q.l
    return torch.where(near.abs() < 0.5, near.log1p(), (p.l / q.l).log())


class MixtureSums(NamedTuple):
    """Sums of the second pass over m = beta q + (1 - beta) p, [n]."""

    jsd: Tensor
    tv: Tensor
    mixture_kl: Tensor  # KL(p || m), for the gradient of a JSD

    def results(self, features: Sequence[str]) -> dict[str, Tensor]:
        """The requested ones, clamped to their bounds."""
        bounded = {"jsd": self.jsd.clamp(0, math.log(2)), "tv": self.tv.clamp(0, 1), "mixture_kl": self.mixture_kl}
        return {name: bounded[name] for name in features}


class TeacherTopK(NamedTuple):
    """The teacher's K largest logits of each row, and the student's at the same vocab ids, [n, K] each."""

    q: Tensor
    p: Tensor
    ids: Tensor

    @staticmethod
    def of_block(z_p: Tensor, z_q: Tensor, first: int, k: int) -> TeacherTopK:
        """The K largest of a block of logits that begins at vocab id `first`; all of them if there are fewer."""
        q, at = z_q.topk(min(k, z_q.shape[1]), dim=1)
        return TeacherTopK(q, z_p.gather(1, at), at + first)

    def best_of(self, other: TeacherTopK, k: int) -> TeacherTopK:
        """The K largest of both."""
        q, p, ids = (torch.cat(pair, 1) for pair in zip(self, other))
        q, at = q.topk(min(k, q.shape[1]), dim=1)
        return TeacherTopK(q, p.gather(1, at), ids.gather(1, at))

    def merged(self, k: int, group: ProcessGroup | None) -> TeacherTopK:
        """The K largest of all ranks. A shard of fewer than K vocab ids is padded with id -1."""
        if group is None:
            return self
        missing = k - self.q.shape[1]
        q, p, ids = (
            torch.cat(gather_over(torch.nn.functional.pad(x, (0, missing), value=filler), group), 1)
            for x, filler in ((self.q, -torch.inf), (self.p, -torch.inf), (self.ids, -1))
        )
        q, at = q.topk(k, dim=1)
        return TeacherTopK(q, p.gather(1, at), ids.gather(1, at))

    def results(self, pair: PairStats, targets: Tensor, tail_p: Tensor, tail_q: Tensor) -> dict[str, Tensor]:
        """KL both ways over {the K ids, the target, a tail of all others}, given the tail's probabilities [n]."""
        seen = (self.ids == targets.unsqueeze(1)).any(1, keepdim=True)
        # A tail that underflows for one head only must not make a KL infinite; one empty for both adds nothing.
        smallest = torch.finfo(tail_p.dtype).tiny * ((tail_p > 0) | (tail_q > 0))
        tail_p, tail_q = torch.maximum(tail_p, smallest), torch.maximum(tail_q, smallest)
        log_p, log_q = _log_buckets(self.p, pair.p, tail_p, seen), _log_buckets(self.q, pair.q, tail_q, seen)
        prob_p, prob_q = log_p.exp(), log_q.exp()
        gap = log_p - log_q  # NaN where both are -inf, but there neither has probability
        reverse = torch.where(prob_p > 0, gap, 0.0).mul_(prob_p).sum(1)
        forward = torch.where(prob_q > 0, gap.neg_(), 0.0).mul_(prob_q).sum(1)
        return {"topk_reverse_kl": reverse.clamp(min=0), "topk_forward_kl": forward.clamp(min=0)}


def _log_buckets(best: Tensor, stats: HeadStats, tail: Tensor, seen: Tensor) -> Tensor:  # [n, K + 2]
    """Log-probs of the K ids, of the target (-inf if it is one of them), and of the tail."""
    target = stats.target.unsqueeze(1).masked_fill(seen, -torch.inf)
    logits = torch.cat([best, target], 1) - stats.m.unsqueeze(1) - stats.log_l.unsqueeze(1)
    return torch.cat([logits, tail.log().unsqueeze(1)], 1)
