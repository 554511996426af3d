"""The credit rules, from signals to weights; `sgcd_kernels.credit_weights` documents what each computes.

Tensor operations over the whole packed batch (`EligibleTokens`), and one scan and one sort by the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sgcd_kernels.backends.protocol import Backend, SpanLimits
from sgcd_kernels.core.validation import in_tensor
from sgcd_kernels.credit.config import CreditConfig
from sgcd_kernels.credit.eligible import EligibleTokens


class Credit(NamedTuple):
    """Per token, packed [N]."""

    weights: Tensor  # W, multiplies the advantage
    saliency: Tensor  # s in [0, 1]
    span_ids: Tensor  # int64, counted through the batch; -1 outside spans


@dataclass(frozen=True)
class Batch:
    """All packed tokens. The weights of ineligible ones are replaced by 1 afterwards."""

    signals: dict[str, Tensor]  # each [N]; only what the rule reads
    tokens: EligibleTokens
    zeros: Tensor  # [N]
    backend: Backend

    def __getitem__(self, name: str) -> Tensor:
        return self.signals[name]


@dataclass(frozen=True)
class Rule:
    """A credit rule and what it reads."""

    compute: Callable[[Batch, CreditConfig], Credit]
    reads: tuple[str, ...]  # arguments of `credit_weights`
    never_acts: Callable[[CreditConfig], bool] = lambda cfg: False  # whether W is 1 whatever it reads


def _normalise(d: Tensor, batch: Batch, cfg: CreditConfig) -> Tensor:
    scale = batch.tokens.quantile(d, cfg.quantile, batch.backend).clamp(min=cfg.d_floor)
    return (d / batch.tokens.spread(scale)).clamp(0, 1)


def _span_saliency(u: Tensor, batch: Batch, cfg: CreditConfig, outside: Tensor) -> tuple[Tensor, Tensor]:
    """(saliency, span ids)"""
    limits = SpanLimits(cfg.start, cfg.reset, cfg.patience, cfg.entropy_ratio, cfg.entropy_margin)
    onset = batch.backend.find_spans(u, batch["teacher_entropy"], batch.tokens.for_backend, limits)
    inside, at = onset >= 0, onset.clamp(min=0)
    number = (onset == torch.arange(onset.numel(), device=onset.device)).cumsum(0) - 1
    saliency = torch.where(inside, u.index_select(0, at) if cfg.span_value == "onset" else u, outside)
    return saliency, torch.where(inside, number.index_select(0, at), -1)


def _plain(weights: Tensor) -> Credit:
    """The credit of a rule that has neither saliency nor spans."""
    return Credit(weights, torch.zeros_like(weights), torch.full_like(weights, -1, dtype=torch.long))


def _sgcd(batch: Batch, cfg: CreditConfig) -> Credit:
    u = _normalise(batch["divergence"], batch, cfg)
    saliency, ids = _span_saliency(u, batch, cfg, batch.zeros)
    return Credit((1 + cfg.gamma * saliency).clamp(1, cfg.clip), saliency, ids)


def _uniform(batch: Batch, cfg: CreditConfig) -> Credit:
    weights, _, ids = _plain(torch.full_like(batch.zeros, min(1 + cfg.gamma, cfg.clip)))
    return Credit(weights, batch.zeros + 1, ids)


def _matched_uniform(batch: Batch, cfg: CreditConfig) -> Credit:
    weights, saliency, ids = _sgcd(batch, cfg)
    # The mean of equal numbers may round to more than them; the bounds of W must hold.
    weights, saliency = (batch.tokens.spread(batch.tokens.mean(x)) for x in (weights, saliency))
    return Credit(weights.clamp(1, cfg.clip), saliency, torch.full_like(ids, -1))


def _permuted(batch: Batch, cfg: CreditConfig) -> Credit:
    to, source = batch.tokens.shuffle(cfg.seed)
    return Credit(*(x.index_copy(0, to, x.index_select(0, source)) for x in _sgcd(batch, cfg)))


def _gear(batch: Batch, cfg: CreditConfig) -> Credit:
    own = _normalise(-batch["log_ratio"], batch, cfg)
    r, ids = _span_saliency(own, batch, cfg, own)
    w = 0.5 + (0.5 - r) * batch["advantages"].sign()
    return Credit(cfg.gear_alpha * w + 1 - cfg.gear_alpha / 2, r, ids)


def _signed_ratio(batch: Batch, epsilon: float) -> Tensor:
    return (batch["advantages"].sign() * batch["log_ratio"]).exp().clamp(1 - epsilon, 1 + epsilon)


def _rlsd(batch: Batch, cfg: CreditConfig) -> Credit:
    return _plain((1 - cfg.rlsd_lambda) + cfg.rlsd_lambda * _signed_ratio(batch, cfg.rlsd_epsilon))


def _sc_grpo(batch: Batch, cfg: CreditConfig) -> Credit:
    kl = batch["forward_kl"]
    scale = batch.tokens.quantile(kl, cfg.sc_grpo_quantile, batch.backend).clamp(min=cfg.sc_grpo_floor)
    return _plain(kl / (kl + batch.tokens.spread(scale)))


def _egrsd(batch: Batch, cfg: CreditConfig) -> Credit:
    calm = (1 - cfg.egrsd_gamma * _relative_to_maximum(batch["teacher_entropy"], batch)).clamp(cfg.egrsd_floor, 1)
    return _plain(_signed_ratio(batch, cfg.egrsd_epsilon) * calm)


def _dgpo(batch: Batch, cfg: CreditConfig) -> Credit:
    tokens = batch.tokens
    hellinger = (1 - batch["bhattacharyya"]).clamp(min=0).sqrt()
    score = hellinger * _relative_to_maximum(batch["student_entropy"], batch) ** cfg.dgpo_kappa / cfg.dgpo_tau
    e = (score - tokens.spread(tokens.maximum(score))).exp()
    return _plain(e * tokens.spread((tokens.counts / tokens.total(e)).to(e.dtype)))


def _turn_level(batch: Batch, cfg: CreditConfig) -> Credit:
    """Every token gets its turn's mean with weight 1 / tokens of the turn: sums over tokens are then over turns."""
    tokens, delta = batch.tokens, batch["log_ratio"].double()
    assert tokens.turns is not None
    order, turns = tokens.by_turn(tokens.turns)
    mean, weight = (
        torch.zeros_like(delta).index_copy(0, order, turns.spread(x))
        for x in (turns.mean(delta[order]), 1 / turns.counts.clamp(min=1).double())
    )
    count = tokens.total(weight)
    gap = mean - tokens.spread(tokens.total(mean * weight) / count)
    deviation = (tokens.total(gap**2 * weight) / count).sqrt()
    score = batch["advantages"].sign() * gap / tokens.spread(deviation.clamp(min=1e-6))
    return _plain((1 + cfg.turn_epsilon * score.tanh()).to(batch.zeros.dtype))


def _relative_to_maximum(entropy: Tensor, batch: Batch) -> Tensor:
    return entropy / batch.tokens.spread(batch.tokens.maximum(entropy).clamp(min=1e-6))


def _none(batch: Batch, cfg: CreditConfig) -> Credit:
    return _plain(batch.zeros + 1)


def _any_is(*values: tuple[float, float]) -> bool:
    """Whether one of the numbers has its value. Those in tensors are not read, and count as others."""
    return any(not in_tensor(number) and number == value for number, value in values)


def _flat(cfg: CreditConfig) -> bool:
    return _any_is((cfg.gamma, 0.0), (cfg.clip, 1.0))


def _spanless(cfg: CreditConfig) -> bool:
    return _flat(cfg) or _any_is((cfg.start, 1.0))  # u never exceeds 1


_SPIKES = ("divergence", "teacher_entropy")
RULES = {
    "sgcd": Rule(_sgcd, _SPIKES, _spanless),
    "none": Rule(_none, (), lambda cfg: True),
    "uniform": Rule(_uniform, (), _flat),
    "matched_uniform": Rule(_matched_uniform, _SPIKES, _spanless),
    "permuted": Rule(_permuted, _SPIKES, _spanless),
    "gear": Rule(_gear, ("advantages", "log_ratio", "teacher_entropy"), lambda cfg: _any_is((cfg.gear_alpha, 0.0))),
    "rlsd": Rule(
        _rlsd, ("advantages", "log_ratio"), lambda cfg: _any_is((cfg.rlsd_lambda, 0.0), (cfg.rlsd_epsilon, 0.0))
    ),
    "sc_grpo": Rule(_sc_grpo, ("forward_kl",)),
    "egrsd": Rule(
        _egrsd,
        ("advantages", "log_ratio", "teacher_entropy"),
        lambda cfg: _any_is((cfg.egrsd_epsilon, 0.0)) and _any_is((cfg.egrsd_gamma, 0.0), (cfg.egrsd_floor, 1.0)),
    ),
    "dgpo": Rule(_dgpo, ("bhattacharyya", "student_entropy")),
    "turn_level": Rule(
        _turn_level, ("advantages", "log_ratio", "turn_ids"), lambda cfg: _any_is((cfg.turn_epsilon, 0.0))
    ),
}


def never_acts(config: CreditConfig) -> bool:
    """Whether every weight is 1 whatever the teacher says: rule "none", gamma 0, clip 1, gear_alpha 0 and so on."""
    return RULES[config.rule].never_acts(config)
