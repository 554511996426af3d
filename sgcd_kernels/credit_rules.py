"""The credit rules, from signals to weights; `sgcd_kernels.credit.credit_weights` says what each computes.

Tensor operations over the whole packed batch (`sgcd_kernels.packed`), and one scan (`sgcd_kernels.spans`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sgcd_kernels.credit_config import CreditConfig
from sgcd_kernels.packed import Packed
from sgcd_kernels.spans import find_spans


@dataclass(frozen=True)
class Batch:
    """All packed tokens; what rules give at ineligible ones is not looked at."""

    inputs: dict[str, Tensor]  # each [N]; only what the rule reads
    turns: Tensor | None  # [N]
    packed: Packed
    zeros: Tensor  # [N]

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]


Triple = tuple[Tensor, Tensor, Tensor]  # weights, saliency, span ids, each [N]


def _normalise(d: Tensor, batch: Batch, cfg: CreditConfig) -> Tensor:
    scale = batch.packed.quantile(d, cfg.quantile).clamp(min=cfg.d_floor)
    return (d / batch.packed.spread(scale)).clamp(0, 1)


def _spread_over_spans(u: Tensor, batch: Batch, cfg: CreditConfig, outside: Tensor) -> tuple[Tensor, Tensor]:
    """(saliency, span ids)"""
    packed = batch.packed
    onset = find_spans(u, batch["teacher_entropy"], batch.turns, packed.eligible, packed.cu_seqlens, cfg)
    inside, at = onset >= 0, onset.clamp(min=0)
    number = (onset == torch.arange(onset.numel(), device=onset.device)).cumsum(0) - 1
    saliency = torch.where(inside, u.index_select(0, at) if cfg.span_value == "onset" else u, outside)
    return saliency, torch.where(inside, number.index_select(0, at), -1)


def _plain(weights: Tensor) -> Triple:
    """A rule without saliency or spans."""
    return weights, torch.zeros_like(weights), torch.full_like(weights, -1, dtype=torch.long)


def _sgcd(batch: Batch, cfg: CreditConfig) -> Triple:
    u = _normalise(batch["divergence"], batch, cfg)
    saliency, ids = _spread_over_spans(u, batch, cfg, batch.zeros)
    return (1 + cfg.gamma * saliency).clamp(1, cfg.clip), saliency, ids


def _uniform(batch: Batch, cfg: CreditConfig) -> Triple:
    weights, _, ids = _plain(torch.full_like(batch.zeros, min(1 + cfg.gamma, cfg.clip)))
    return weights, batch.zeros + 1, ids


def _matched_uniform(batch: Batch, cfg: CreditConfig) -> Triple:
    weights, saliency, ids = _sgcd(batch, cfg)
    # The mean of equal numbers may round past them; the bounds of W must hold.
    weights, saliency = (batch.packed.spread(batch.packed.mean(x)) for x in (weights, saliency))
    return weights.clamp(1, cfg.clip), saliency, torch.full_like(ids, -1)


def _permuted(batch: Batch, cfg: CreditConfig) -> Triple:
    to, source = batch.packed.shuffle(cfg.seed)
    weights, saliency, ids = (x.index_copy(0, to, x.index_select(0, source)) for x in _sgcd(batch, cfg))
    return weights, saliency, ids


def _gear(batch: Batch, cfg: CreditConfig) -> Triple:
    own = _normalise(-batch["log_ratio"], batch, cfg)
    r, ids = _spread_over_spans(own, batch, cfg, own)
    w = 0.5 + (0.5 - r) * batch["advantages"].sign()
    return cfg.gear_alpha * w + 1 - cfg.gear_alpha / 2, r, ids


def _signed_ratio(batch: Batch, epsilon: float) -> Tensor:
    return (batch["advantages"].sign() * batch["log_ratio"]).exp().clamp(1 - epsilon, 1 + epsilon)


def _rlsd(batch: Batch, cfg: CreditConfig) -> Triple:
    return _plain((1 - cfg.rlsd_lambda) + cfg.rlsd_lambda * _signed_ratio(batch, cfg.rlsd_epsilon))


def _sc_grpo(batch: Batch, cfg: CreditConfig) -> Triple:
    kl = batch["forward_kl"]
    scale = batch.packed.quantile(kl, cfg.sc_grpo_quantile).clamp(min=cfg.sc_grpo_floor)
    return _plain(kl / (kl + batch.packed.spread(scale)))


def _egrsd(batch: Batch, cfg: CreditConfig) -> Triple:
    calm = (1 - cfg.egrsd_gamma * _share_of_maximum(batch["teacher_entropy"], batch)).clamp(cfg.egrsd_floor, 1)
    return _plain(_signed_ratio(batch, cfg.egrsd_epsilon) * calm)


def _dgpo(batch: Batch, cfg: CreditConfig) -> Triple:
    packed = batch.packed
    hellinger = (1 - batch["bhattacharyya"]).clamp(min=0).sqrt()
    score = hellinger * _share_of_maximum(batch["student_entropy"], batch) ** cfg.dgpo_kappa / cfg.dgpo_tau
    e = (score - packed.spread(packed.maximum(score))).exp()
    return _plain(e * packed.spread((packed.tokens / packed.total(e)).to(e.dtype)))


def _turn_level(batch: Batch, cfg: CreditConfig) -> Triple:
    """Sums over tokens that each have their turn's mean and a share of 1 / its tokens are sums over turns."""
    packed, delta = batch.packed, batch["log_ratio"].double()
    assert batch.turns is not None
    order, turns = packed.by_turn(batch.turns)
    mean, share = (
        torch.zeros_like(delta).index_copy(0, order, turns.spread(x))
        for x in (turns.mean(delta[order]), 1 / turns.tokens.clamp(min=1).double())
    )
    count = packed.total(share)
    gap = mean - packed.spread(packed.total(mean * share) / count)
    deviation = (packed.total(gap**2 * share) / count).sqrt()
    score = batch["advantages"].sign() * gap / packed.spread(deviation.clamp(min=1e-6))
    return _plain((1 + cfg.turn_epsilon * score.tanh()).to(batch.zeros.dtype))


def _share_of_maximum(entropy: Tensor, batch: Batch) -> Tensor:
    return entropy / batch.packed.spread(batch.packed.maximum(entropy).clamp(min=1e-6))


NEEDS: dict[str, tuple[str, ...]] = {  # all that a rule reads
    "sgcd": ("divergence", "teacher_entropy"),
    "none": (),
    "uniform": (),
    "matched_uniform": ("divergence", "teacher_entropy"),
    "permuted": ("divergence", "teacher_entropy"),
    "gear": ("advantages", "log_ratio", "teacher_entropy"),
    "rlsd": ("advantages", "log_ratio"),
    "sc_grpo": ("forward_kl",),
    "egrsd": ("advantages", "log_ratio", "teacher_entropy"),
    "dgpo": ("bhattacharyya", "student_entropy"),
    "turn_level": ("advantages", "log_ratio"),  # and turn_ids
}
USE_GAMMA = ("sgcd", "uniform", "matched_uniform", "permuted")
RULES: dict[str, Callable[[Batch, CreditConfig], Triple]] = {
    "sgcd": _sgcd,
    "uniform": _uniform,
    "matched_uniform": _matched_uniform,
    "permuted": _permuted,
    "gear": _gear,
    "rlsd": _rlsd,
    "sc_grpo": _sc_grpo,
    "egrsd": _egrsd,
    "dgpo": _dgpo,
    "turn_level": _turn_level,
}
