"""Merging the statistics of shares of the vocabulary: max, sum, and sums rescaled by e^(m - max)."""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.torch_backend.divergence import PairStats
from sgcd_kernels.torch_backend.logprob import RowStats


def merged_head(parts: Tensor) -> RowStats:  # [shares, 4, n]
    """One head's, from its m, z, s and target logit in each share."""
    return _merge(parts)[0]


def merged_pair(parts: Tensor) -> PairStats:  # [shares, 11, n]
    """Both heads', from those of each and a_p, a_q and the overlap in each share."""
    stats = PairStats(0, parts)
    stats.p, shift_p = _merge(parts[:, :4])
    stats.q, shift_q = _merge(parts[:, 4:8])
    stats.a_p = _shrunk(parts[:, 8], shift_p).sum(0)
    stats.a_q = _shrunk(parts[:, 9], shift_q).sum(0)
    stats.overlap = (parts[:, 10] * ((shift_p + shift_q) / 2).exp()).sum(0)
    return stats


def _merge(parts: Tensor) -> tuple[RowStats, Tensor]:  # and [shares, n], the shift of each share's exponents
    m, z, s, target = parts.unbind(1)
    stats = RowStats(0, parts)
    stats.m = m.amax(0)
    shift = torch.where(z > 0, m - stats.m, 0.0)
    stats.z = (z * shift.exp()).sum(0)
    stats.s = _shrunk(s + shift * z, shift).sum(0)
    stats.target = target.sum(0)
    return stats, shift


def _shrunk(x: Tensor, shift: Tensor) -> Tensor:
    """Mass that underflows takes an infinite sum with it: 0 times inf would be NaN."""
    shrink = shift.exp()
    return torch.where(shrink > 0, x * shrink, 0.0)
