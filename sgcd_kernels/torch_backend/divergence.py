"""Divergences of two heads over one vocabulary, folded block by block: formulas in `sgcd_kernels.linear_divergence`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.shard import shard_range, sum_over
from sgcd_kernels.torch_backend.blocks import Blocks, Rows, block_logits, load_rows, load_words, plan
from sgcd_kernels.torch_backend.logprob import RowStats
from sgcd_kernels.torch_backend.topk import TeacherTopK
from sgcd_kernels.types import Projection

Pair = tuple[Tensor, Tensor]  # student's, teacher's


class PairStats:
    """Running statistics of t rows of both heads."""

    p: RowStats
    q: RowStats
    a_p: Tensor  # [t], sum e^{z_p - m_p} (z_p - z_q)
    a_q: Tensor  # [t]
    overlap: Tensor  # [t]

    def __init__(self, tokens: int, like: Tensor) -> None:
        self.p, self.q = RowStats(tokens, like), RowStats(tokens, like)
        self.a_p, self.a_q, self.overlap = (like.new_zeros(tokens) for _ in range(3))

    def fold(self, z_p: Tensor, z_q: Tensor) -> None:
        """Fold a block of logits in; `z_p` and `z_q` are kept."""
        e_p, shift_p = self.p.fold(z_p)
        e_q, shift_q = self.q.fold(z_q)
        self._shrink(shift_p, shift_q)
        # The root of e_p e_q would underflow where the halves of the exponents do not.
        half = (z_p - self.p.m.unsqueeze(1)).mul_(0.5).add_((z_q - self.q.m.unsqueeze(1)).mul_(0.5))
        self.overlap = self.overlap + half.exp_().sum(1)
        delta = torch.sub(z_p, z_q, out=half)
        self.a_p = self.a_p + torch.where(e_p > 0, delta, 0.0).mul_(e_p).sum(1)  # 0 ln 0 = 0, also where ln is inf
        self.a_q = self.a_q + torch.where(e_q > 0, delta, 0.0).mul_(e_q).sum(1)

    def _shrink(self, shift_p: Tensor, shift_q: Tensor) -> None:
        shrink_p, shrink_q = shift_p.exp(), shift_q.exp()
        # Mass that underflows takes an infinite difference with it: 0 times inf would be NaN.
        self.a_p = torch.where(shrink_p > 0, self.a_p * shrink_p, 0.0)
        self.a_q = torch.where(shrink_q > 0, self.a_q * shrink_q, 0.0)
        self.overlap = self.overlap * ((shift_p + shift_q) / 2).exp()  # equal shifts shrink it as they do Z

    def merge(self, group: ProcessGroup | None) -> None:
        shift_p, shift_q = self.p.merge(group), self.q.merge(group)
        if shift_p is not None and shift_q is not None:
            self._shrink(shift_p, shift_q)
            self.a_p, self.a_q, self.overlap = (sum_over(x, group) for x in (self.a_p, self.a_q, self.overlap))

    def results(self) -> dict[str, Tensor]:
        (logp_p, entropy_p, lse_p), (logp_q, entropy_q, lse_q) = self.p.results(), self.q.results()
        # Not lse_p - lse_q: each is rounded at the size of a logit, their difference need not be.
        gap = (self.p.m - self.q.m) + (self.p.z / self.q.z).log()
        return {
            "student_logp": logp_p,
            "teacher_logp": logp_q,
            "student_entropy": entropy_p,
            "teacher_entropy": entropy_q,
            "student_lse": lse_p,
            "teacher_lse": lse_q,
            "reverse_kl": (self.a_p / self.p.z - gap).clamp(min=0),
            "forward_kl": (gap - self.a_q / self.q.z).clamp(min=0),
            "bhattacharyya": (self.overlap / (self.p.z * self.q.z).sqrt()).clamp(max=1),
        }


def divergence_forward(
    student: Projection,
    teacher: Projection,
    targets: Tensor,  # [n]
    features: tuple[str, ...],
    beta: float,
    top_k: int | None,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The asked-for fields of DivergenceStats, each [n]."""
    offset, _ = shard_range(student.weight, group)
    blocks = pair_plan(student, teacher)
    parts = []
    like = torch.empty(0, dtype=pair_dtype(student, teacher), device=student.hidden.device)
    for t0, t1 in list(blocks.token_ranges()) or [(0, 0)]:  # an empty batch still has its fields
        rows = load_rows(student, t0, t1), load_rows(teacher, t0, t1)
        stats = PairStats(t1 - t0, like)
        best = None if top_k is None else TeacherTopK(top_k, targets[t0:t1])
        for start, stop in blocks.word_ranges() if t1 > t0 else ():
            z_p, z_q = pair_logits(student, teacher, rows, start, stop)
            stats.p.pick_target(z_p, targets[t0:t1], offset + start)
            stats.q.pick_target(z_q, targets[t0:t1], offset + start)
            stats.fold(z_p, z_q)
            if best is not None:
                best.fold(z_p, z_q, offset + start)
        stats.merge(group)
        part = stats.results()
        if best is not None:
            best.merge(group)
        if features or best is not None:
            pass_two = _SecondPass(stats, features, beta, best)
            for start, stop in blocks.word_ranges() if t1 > t0 else ():
                pass_two.fold(*pair_logits(student, teacher, rows, start, stop), offset + start)
            pass_two.merge(group)
            part |= pass_two.results()
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def pair_dtype(student: Projection, teacher: Projection) -> torch.dtype:
    return torch.promote_types(student.stats_dtype, teacher.stats_dtype)


def pair_plan(student: Projection, teacher: Projection) -> Blocks:
    return plan((student, teacher), 8, row_copies=2, word_copies=3)


def pair_logits(student: Projection, teacher: Projection, rows: tuple[Rows, Rows], start: int, stop: int) -> Pair:
    """One block of both heads' final logits, in one dtype."""
    z_p = block_logits(student, rows[0], load_words(student, start, stop), start, stop)
    z_q = block_logits(teacher, rows[1], load_words(teacher, start, stop), start, stop)
    dtype = pair_dtype(student, teacher)
    return z_p.to(dtype), z_q.to(dtype)


class _SecondPass:
    """What needs both normalisers, or the teacher's top K, first."""

    def __init__(self, stats: PairStats, features: tuple[str, ...], beta: float, best: TeacherTopK | None) -> None:
        self.stats, self.beta, self.best = stats, beta, best
        self.sums = {name: torch.zeros_like(stats.p.z) for name in features}
        self.tail_p, self.tail_q = torch.zeros_like(stats.p.z), torch.zeros_like(stats.q.z)

    def fold(self, z_p: Tensor, z_q: Tensor, first_word: int) -> None:
        """Fold a block in; the logits are used up."""
        log_p, log_q = self.stats.p.normalise(z_p), self.stats.q.normalise(z_q)
        if self.best is not None:
            # Summed, not 1 minus the rest: beside a certain word that would leave nothing but rounding.
            self.tail_p += self.best.drop_from(log_p.exp(), first_word).sum(1)
            self.tail_q += self.best.drop_from(log_q.exp(), first_word).sum(1)
        if "tv" in self.sums:
            self.sums["tv"] += (log_p.exp() - log_q.exp()).abs_().sum(1).mul_(0.5)
        if "jsd" in self.sums:
            to_p, to_q = log_mixture_ratios(log_p, log_q, self.beta)
            of_p = log_p.exp_().mul_(to_p).sum(1)
            self.sums["jsd"] += (1 - self.beta) * of_p
            if "mixture_kl" in self.sums:
                self.sums["mixture_kl"] += of_p
            self.sums["jsd"] += log_q.exp_().mul_(to_q).mul_(self.beta).sum(1)

    def merge(self, group: ProcessGroup | None) -> None:
        for total in (*self.sums.values(), self.tail_p, self.tail_q):
            sum_over(total, group)

    def results(self) -> dict[str, Tensor]:
        limits = {"tv": 1.0, "jsd": math.log(2)}
        out = {name: value.clamp(0, limits[name]) if name in limits else value for name, value in self.sums.items()}
        return (
            out if self.best is None else out | self.best.results(self.stats.p, self.stats.q, self.tail_p, self.tail_q)
        )


def log_mixture_ratios(log_p: Tensor, log_q: Tensor, beta: float) -> Pair:
    """ln(p / m) and ln(q / m) for m = beta q + (1 - beta) p; exactly 0 where p = q.

    Beyond 80 nats apart the smaller of the two adds nothing to any sum, so its ratio may stop there.
    """
    delta = log_p - log_q
    delta.masked_fill_(log_p.isneginf() & log_q.isneginf(), 0.0).clamp_(-80, 80)
    to_p = torch.expm1(-delta).mul_(beta).log1p_().neg_()
    to_q = delta.expm1_().mul_(1 - beta).log1p_().neg_()
    return to_p, to_q
