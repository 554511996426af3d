"""KL over the teacher's K likeliest words, the observed token and a tail bucket, gathered as words stream by."""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.torch_backend.logprob import RowStats


class TeacherTopK:
    """The teacher's best K logits of t rows so far, with the student's at the same words."""

    def __init__(self, k: int, targets: Tensor, vocab: int) -> None:
        self.k, self.targets, self.vocab = k, targets, vocab
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

    def results(self, p: RowStats, q: RowStats) -> dict[str, Tensor]:
        """KL both ways over the buckets, [t]."""
        if self.q is None or self.p is None or self.words is None:
            return {"topk_reverse_kl": p.z, "topk_forward_kl": p.z}  # no rows
        seen = (self.words == self.targets.unsqueeze(1)).any(1, keepdim=True)
        log_p, mass_p = _buckets(self.p, p, seen)
        log_q, mass_q = _buckets(self.q, q, seen)
        tail_p, tail_q = _tail(mass_p, self.k >= self.vocab), _tail(mass_q, self.k >= self.vocab)
        gap = torch.where(log_p.isneginf() & log_q.isneginf(), 0.0, log_p - log_q)
        tail_gap = torch.where(tail_p > 0, (tail_p / tail_q).log(), 0.0)
        reverse = torch.where(mass_p > 0, gap, 0.0).mul(mass_p).sum(1) + tail_p * tail_gap
        forward = torch.where(mass_q > 0, -gap, 0.0).mul(mass_q).sum(1) - tail_q * tail_gap
        return {"topk_reverse_kl": reverse.clamp(min=0), "topk_forward_kl": forward.clamp(min=0)}


def _buckets(best: Tensor, stats: RowStats, seen: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs, probabilities) of the K words and the observed token, which is 0 if it is one of them."""
    target = stats.target.unsqueeze(1).masked_fill(seen, -torch.inf)
    log_probs = torch.cat([best, target], 1) - stats.m.unsqueeze(1) - stats.z.log().unsqueeze(1)
    return log_probs, log_probs.exp()


def _tail(mass: Tensor, empty: bool) -> Tensor:
    """What the buckets leave. Not below the rounding of a sum near 1: else rounding alone could make a KL infinite."""
    left = (1 - mass.sum(1)).clamp(min=torch.finfo(mass.dtype).eps)
    return torch.zeros_like(left) if empty else left
