"""The interface of a backend: four modules with these functions. Nothing here runs.

Rows are computed tokens, n of them. Results have the dtype of the statistics (`Projection.stats_dtype`); for two heads,
the wider one. Under vocab-parallelism (`LMHead.group`) every rank calls with its shard and gets the full result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection
    from sgcd_kernels.core.statistics import LogprobValues


IMPLS = ("auto", "triton", "cpp", "torch")  # the values of `impl=`


class DivergenceOptions(NamedTuple):
    """What `divergence_forward` returns in addition to the fields of one pass."""

    features: tuple[str, ...] = ()  # any of jsd, tv and mixture_kl; mixture_kl, KL(p || m), only together with jsd
    beta: float = 0.5  # weight of the teacher in m = beta q + (1 - beta) p
    top_k: int | None = None


class DistillSaved(NamedTuple):
    """What the forward pass of a distillation loss saves per row, [n]."""

    student_lse: Tensor
    student_lse_low: Tensor
    teacher_lse: Tensor
    teacher_lse_low: Tensor
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
        """log p(y), entropy, lse and lse_low of each row; tiles cached for a `logprob_backward`, or None."""

    def logprob_backward(
        self,
        x: Projection,
        targets: Tensor,  # [n]
        values: LogprobValues,  # lse and lse_low; logp if known; and the entropy where it has an upstream gradient
        upstream: LogprobValues,
        needs: Needs,
        cached: Any = None,
    ) -> HeadGrads:
        """Gradients of sum(d_logp logp + d_entropy entropy + d_lse lse).

        With respect to a logit: d_logp (1[v = y] - p) + d_lse p - d_entropy p (ln p + entropy). 1 - p of the target is
        -expm1(ln p): of a nearly certain token, 1 - p would be rounding error. `cached` may be given only without
        d_entropy, and is consumed.
        """

    def target_logp(self, x: Projection, targets: Tensor, lse: Tensor, lse_low: Tensor | None) -> Tensor:  # [n]
        """log p(y), given the log-sum-exp: one dot product per row."""

    def divergence_forward(
        self, student: Projection, teacher: Projection, targets: Tensor, options: DivergenceOptions
    ) -> dict[str, Tensor]:
        """The requested fields of DivergenceStats, by name. There is at least one row."""

    def distill_backward(
        self,
        student: Projection,
        teacher: Projection,
        divergence: tuple[str, float],  # kind and beta
        saved: DistillSaved,
        upstream: Tensor,  # [n]
        needs: Needs,
    ) -> HeadGrads:
        """Gradients of sum(upstream divergence). With respect to a student logit, with r = ln(p / m):

        reverse_kl: p (ln p - ln q - KL)     forward_kl: p - q     jsd: (1 - beta) p (r - sum p r)

        Where KL(p || q) is +inf, inf - inf is no gradient: that row's is 0.
        """

    def find_spans(
        self,
        u: Tensor,  # [N] normalised divergence, fp32 or fp64
        entropy: Tensor,  # [N] the teacher's, of the same dtype
        tokens: CreditTokens,
        limits: SpanLimits,
    ) -> Tensor:  # [N] int64
        """Per token, the packed index of the onset of its span, or -1 outside spans.

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
        """Sort each sequence's eligible values in ascending order; return those at the indices `low` and `high`."""
