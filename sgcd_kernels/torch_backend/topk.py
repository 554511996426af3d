"""KL over the teacher's K likeliest words, the observed token and a tail bucket, gathered as words stream by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.shard import gather_over
from sgcd_kernels.torch_backend.logprob import RowStats


class TeacherTopK:
    """The teacher's best K logits of t rows so far, with the student's at the same words."""

    def __init__(self, k: int, targets: Tensor) -> None:
        self.k: int = k
        self.targets: Tensor = targets  # [t]
        self.q: Tensor | None = None  # [t, <= K]
        self.p: Tensor | None = None
        self.words: Tensor | None = None

    def fold(self, z_p: Tensor, z_q: Tensor, first_word: int) -> None:
        """Merge a block: its own best K compete with the best K so far."""
        q, at = z_q.topk(min(self.k, z_q.shape[1]), dim=1)
        p, words = z_p.gather(1, at), at + first_word
        if self.q is not None and self.p is not None and self.words is not None:
            q, p, words = torch.cat([self.q, q], 1), torch.cat([self.p, p], 1), torch.cat([self.words, words], 1)
            q, at = q.topk(min(self.k, q.shape[1]), dim=1)
            p, words = p.gather(1, at), words.gather(1, at)
        self.q, self.p, self.words = q, p, words

    def merge(self, group: ProcessGroup | None) -> None:
        """Let every rank's best K compete. A shard of fewer words than K fills up with words that are none."""
        if group is None or self.q is None or self.p is None or self.words is None:
            return
        missing = self.k - self.q.shape[1]
        q, p, words = (
            torch.cat(gather_over(torch.nn.functional.pad(x, (0, missing), value=none), group), 1)
            for x, none in ((self.q, -torch.inf), (self.p, -torch.inf), (self.words, -1))
        )
        self.q, at = q.topk(self.k, dim=1)
        self.p, self.words = p.gather(1, at), words.gather(1, at)

    def drop_from(self, e: Tensor, first_word: int) -> Tensor:
        """Set the buckets' own words to 0 in a block of probabilities, in place."""
        assert self.words is not None
        local = torch.cat([self.words, self.targets.unsqueeze(1)], 1) - first_word
        row, column = ((local >= 0) & (local < e.shape[1])).nonzero(as_tuple=True)
        e[row, local[row, column]] = 0
        return e

    def results(self, p: RowStats, q: RowStats, tail_p: Tensor, tail_q: Tensor) -> dict[str, Tensor]:
        """KL both ways over the buckets, [t], given the probability of the tails, [t]."""
        if self.q is None or self.p is None or self.words is None:
            return {"topk_reverse_kl": tail_p, "topk_forward_kl": tail_p}  # no rows
        seen = (self.words == self.targets.unsqueeze(1)).any(1, keepdim=True)
        # A tail that underflows on one side only is no reason for an infinite KL; one empty on both sides adds nothing.
        floor = torch.finfo(tail_p.dtype).tiny * ((tail_p > 0) | (tail_q > 0))
        tail_p, tail_q = torch.maximum(tail_p, floor), torch.maximum(tail_q, floor)
        log_p, log_q = _log_buckets(self.p, p, tail_p, seen), _log_buckets(self.q, q, tail_q, seen)
        prob_p, prob_q = log_p.exp(), log_q.exp()
        gap = log_p - log_q  # nan where both are -inf, but there neither has probability
        reverse = torch.where(prob_p > 0, gap, 0.0).mul_(prob_p).sum(1)
        forward = torch.where(prob_q > 0, gap.neg_(), 0.0).mul_(prob_q).sum(1)
        return {"topk_reverse_kl": reverse.clamp(min=0), "topk_forward_kl": forward.clamp(min=0)}


def _log_buckets(best: Tensor, stats: RowStats, tail: Tensor, seen: Tensor) -> Tensor:  # [t, K + 2]
    """Log-probs of the K words, the observed token (-inf if it is one of them), and the tail."""
    target = stats.target.unsqueeze(1).masked_fill(seen, -torch.inf)
    words = torch.cat([best, target], 1) - stats.m.unsqueeze(1) - stats.z.log().unsqueeze(1)
    return torch.cat([words, tail.log().unsqueeze(1)], 1)
