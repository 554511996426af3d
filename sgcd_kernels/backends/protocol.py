"""What a backend implements. Nothing here runs: a backend is four modules with these functions.

Rows are computed tokens, n of them. Results are in the dtype of the statistics (`Projection.stats_dtype`), of two heads
in the wider one. Under vocab-parallelism (`LMHead.group`) every rank calls with its shard and gets the full result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection
    from sgcd_kernels.core.statistics import LogprobValues


IMPLS = ("auto", "triton", "cpp", "torch")  # what `impl=` may be


class DivergenceOptions(NamedTuple):
    """What `divergence_forward` gives beside the fields of one pass."""

    features: tuple[str, ...] = ()  # of jsd, tv and mixture_kl, which is KL(p || m) and given with jsd only
    beta: float = 0.5  # weight of the teacher in m = beta q + (1 - beta) p
    top_k: int | None = None


class DistillSaved(NamedTuple):
    """What the forward pass of a distillation knows of each row, [n]."""

    student_lse: Tensor
    teacher_lse: Tensor
    mean_log_ratio: Tensor  # sum p ln(p / m): KL(p || q) for kind reverse_kl, KL(p || m) for jsd


class CreditTokens(NamedTuple):
    """Packed tokens as the span scan reads them, [N]."""

    eligible: Tensor  # bool
    cu_seqlens: Tensor  # [B + 1] int64
    turns: Tensor | None  # int64


class SpanLimits(NamedTuple):
    """Where a span of credit starts and ends: fields of `CreditConfig`."""

    start: float
    reset: float
    patience: int
    entropy_ratio: float
    entropy_margin: float


class Backend(Protocol):
    """logprob.py, divergence.py, distill.py and credit.py of a backend, as one object."""

    def logprob_forward(
        self,
        x: Projection,
        targets: Tensor,  # [n]
        cache_for: Needs | None = None,
    ) -> tuple[LogprobValues, Any]:
        """log p(y), entropy and lse of each row, and tiles cached for a `logprob_backward` of these needs (or None)."""

    def logprob_backward(
        self,
        x: Projection,
        targets: Tensor,  # [n]
        values: LogprobValues,  # lse; and the entropy where it has an upstream gradient
        upstream: LogprobValues,
        needs: Needs,
        cached: Any = None,
    ) -> HeadGrads:
        """Gradients of sum(d_logp logp + d_entropy entropy + d_lse lse). `cached` is used up; without d_entropy only.

        In a logit: d_logp (1[v = y] - p) + d_lse p - d_entropy p (ln p + entropy).
        """

    def target_logp(self, x: Projection, targets: Tensor, lse: Tensor) -> Tensor:  # [n]
        """log p(y) where lse is known: one dot product per row."""

    def divergence_forward(
        self, student: Projection, teacher: Projection, targets: Tensor, options: DivergenceOptions
    ) -> dict[str, Tensor]:
        """The asked-for fields of DivergenceStats by name. There is at least one row."""

    def distill_backward(
        self,
        student: Projection,
        teacher: Projection,
        divergence: tuple[str, float],  # kind and beta
        saved: DistillSaved,
        upstream: Tensor,  # [n]
        needs: Needs,
    ) -> HeadGrads:
        """Gradients of sum(upstream divergence). In a student logit, with r = ln(p / m):

        reverse_kl: p (ln p - ln q - KL)     forward_kl: p - q     jsd: (1 - beta) p (r - sum p r)
        """

    def find_spans(
        self,
        u: Tensor,  # [N] normalised divergence, fp32 or fp64
        entropy: Tensor,  # [N] the teacher's, of the same dtype
        tokens: CreditTokens,
        limits: SpanLimits,
    ) -> Tensor:  # [N] int64
        """The packed index of the onset of the span that a token lies in, or -1 outside spans.

        A span starts at a token with u > start. It ends before the first token whose teacher entropy is above
        max(entropy_ratio H_onset, H_onset + entropy_margin), before the token that completes `patience` quiet ones
        (u < reset) in a row, and where the turn or the sequence ends. The token that ends a span may start the next.
        Ineligible tokens are skipped: they end no span and get -1. Thresholds are compared in fp64.
        """

    def order_statistics(
        self,
        x: Tensor,  # [N]
        tokens: CreditTokens,
        low: Tensor,  # [B]
        high: Tensor,  # [B]
    ) -> Tensor:  # [2, B]
        """Of each sequence's eligible values in rising order, those at two places."""
