"""The GRPO family as a function of log p(y) alone: the one definition of the loss, shared by every backend.

Per token, with the ratio r = exp(logp - old_logp), advantage A, and both clip bounds around 1:

    grpo, bnpo, dr_grpo, dapo   -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)     PPO, arXiv 1707.06347
    gspo                        the same with r the sequence's geometric mean ratio, its gradient through the token
                                (GSPO-token, arXiv 2507.18071 eq. 14): equal to GSPO when A is constant in a sequence
    cispo                       -stop_gradient(min(r, 1 + epsilon_high)) A logp          MiniMax-M1, arXiv 2506.13585

times the importance weight, plus beta (exp(d) - d - 1) with d = ref_logp - logp (the k3 estimate of KL(p || ref)).
Nothing else is clamped: a ratio or k3 beyond any clip counts as the formula says, in loss and gradient, and shows in
the metrics `ratio/max` and `kl`. Beyond e^88 (in fp32) it is inf, and so is the loss; but where the clip bounds the
term, or A is 0, the gradient is 0 however large the ratio.
Sums are divided by

    grpo, gspo          each sequence's loss tokens, then the number of sequences
    bnpo, dapo, cispo   the number of loss tokens
    dr_grpo             sequences x longest sequence (arXiv 2503.20783 asks for a constant: give num_items_in_batch)

where `num_items_in_batch` replaces the last divisor, so that micro-batches sum to the whole batch's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sgcd_kernels.core.segments import Segments
from sgcd_kernels.core.validation import SMALLEST, check_choice, check_float, in_tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo")
# What other libraries know by a name that is none of these (as of TRL 1.16, Liger 0.8, verl 0.9).
LOSSES_ELSEWHERE = {
    name: f"{what} of {owner} that this library does not have"
    for what, owner, names in (
        ("a loss", "TRL, Liger and verl", "sapo"),
        ("a loss", "TRL and Liger", "luspo vespo"),
        ("a loss", "TRL", "gmpo a2po tpo sdpo dpo ipo kto bco cpo simpo alphapo orpo online_dpo nash_md xpo sft"),
        ("a loss", "verl", "geo_mean gpg clip_cov kl_cov dppo_tv dppo_kl dro bypass_mode"),
        ("a loss", "prime-rl or SkyRL", "icepop aipo opd dual_clip cross_entropy"),
        (
            "a loss",
            "the literature",
            "bapo dcpo dppo dgpo dspo papo vapo gvpo gtpo gfpo srpo cppo fipo apo gpo spo ppg trpo",
        ),
        ("an advantage estimator", "verl", "gae remax opo gdpo grpo_passk grpo_vectorized rloo_vectorized"),
        ("an advantage estimator", "verl", "optimal_token_baseline tir_optimal_token_baseline"),
        ("an advantage estimator", "verl and OpenRLHF", "reinforce reinforce_baseline reinforce_plus_plus group_norm"),
        ("an advantage estimator", "verl and OpenRLHF", "reinforce++ reinforce_plus_plus_baseline rloo"),
    )
    for name in names.split()
} | dict.fromkeys(
    ("vanilla", "ppo", "regular", "clip", "default"),
    "a name of the clipped loss elsewhere; here grpo averages it over sequences, bnpo and dapo over tokens",
)
PER_SEQUENCE = ("grpo", "gspo", "dr_grpo")  # these need to know where sequences begin


@dataclass(frozen=True)
class PolicyLossConfig:
    """The hyperparameters of a policy loss. Raises ValueError naming the invalid field.

    >>> PolicyLossConfig(loss_type="dapo", epsilon_high=0.28).epsilon
    0.2
    """

    loss_type: str = "grpo"
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None is epsilon; for cispo, whose cap is 1 + epsilon_high, from -1
    beta: float = 0.0  # weight of the k3 estimate of KL(p || ref)
    num_items_in_batch: float | Tensor | None = None  # the divisor of the whole batch; None counts this call's

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, LOSS_TYPES, LOSSES_ELSEWHERE)
        check_float("epsilon", self.epsilon, 0.0)
        check_float("beta", self.beta, 0.0)
        if self.epsilon_high is not None:
            check_float("epsilon_high", self.epsilon_high, -1.0 if self.loss_type == "cispo" else 0.0)
        if self.num_items_in_batch is not None:
            check_float("num_items_in_batch", self.num_items_in_batch, SMALLEST)

    @property
    def has_kl(self) -> bool:
        """Whether there is a term of the reference. The value of a tensor is not read: it counts as not 0."""
        return in_tensor(self.beta) or self.beta != 0

    @property
    def clip_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class TokenInputs(NamedTuple):
    """The inputs of the loss per token besides its log-prob: [n], or None."""

    old_logp: Tensor | None = None  # None is on-policy
    ref_logp: Tensor | None = None
    importance_weights: Tensor | None = None


class PolicyMetrics(NamedTuple):
    """Metrics over the loss tokens; `named` gives them their public names."""

    clip_low: Tensor
    clip_high: Tensor
    clip_region: Tensor
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    num_tokens: Tensor
    kl: Tensor | None = None
    entropy: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        values = {
            "clip_ratio/low_mean": self.clip_low,
            "clip_ratio/high_mean": self.clip_high,
            "clip_ratio/region_mean": self.clip_region,
            "ratio/mean": self.ratio_mean,
            "ratio/min": self.ratio_min,
            "ratio/max": self.ratio_max,
            "num_tokens": self.num_tokens,
            "kl": self.kl,
            "entropy": self.entropy,
        }
        return {name: value for name, value in values.items() if value is not None}


def surrogate_loss(
    logp: Tensor,  # [n]
    advantages: Tensor,  # [n]
    segments: Segments,
    cfg: PolicyLossConfig,
    tokens: TokenInputs = TokenInputs(),  # noqa: B008  # immutable
) -> tuple[Tensor, PolicyMetrics]:
    """The loss, differentiable in `logp`, and its metrics."""
    log_ratio = _log_ratio(logp, logp.detach() if tokens.old_logp is None else tokens.old_logp, segments, cfg)
    ratio = log_ratio.detach().exp()
    token_loss = _policy_term(logp, log_ratio, advantages, cfg)
    if tokens.importance_weights is not None:
        token_loss = token_loss * tokens.importance_weights
    metrics = _metrics(ratio, advantages, cfg)
    if tokens.ref_logp is not None:
        gap = tokens.ref_logp - logp
        kl = gap.expm1() - gap
        token_loss = token_loss + cfg.beta * kl
        metrics = metrics._replace(kl=_mean(kl.detach()))
    return _reduce(token_loss, segments, cfg), metrics


def _log_ratio(logp: Tensor, old_logp: Tensor, segments: Segments, cfg: PolicyLossConfig) -> Tensor:
    log_ratio = logp - old_logp
    if cfg.loss_type == "gspo":
        sequence = segments.mean(log_ratio.detach())[segments.ids]
        log_ratio = sequence + logp - logp.detach()
    return log_ratio


def _policy_term(logp: Tensor, log_ratio: Tensor, advantages: Tensor, cfg: PolicyLossConfig) -> Tensor:
    ratio = log_ratio.detach().exp()
    if cfg.loss_type == "cispo":
        return -ratio.clamp(max=1 + cfg.clip_high) * advantages * logp
    # Replaced before exp: the gradient of an infinite ratio that counts for nothing would be 0 times inf.
    low, high = _cut_off(ratio, advantages, cfg)
    constant = low | high | (advantages == 0)
    kept = log_ratio.masked_fill(constant, 0.0).exp()
    return -torch.where(constant, ratio.clamp(1 - cfg.epsilon, 1 + cfg.clip_high), kept) * advantages


def _cut_off(ratio: Tensor, advantages: Tensor, cfg: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """Where the lower and the upper clip bound the term: min(r A, clip(r) A) is the second there."""
    return (ratio < 1 - cfg.epsilon) & (advantages < 0), (ratio > 1 + cfg.clip_high) & (advantages > 0)


def _reduce(token_loss: Tensor, segments: Segments, cfg: PolicyLossConfig) -> Tensor:
    if cfg.loss_type in ("grpo", "gspo"):
        total, items = segments.mean(token_loss).sum(), float(segments.count)
    elif cfg.loss_type == "dr_grpo":
        total, items = token_loss.sum(), float(segments.count * segments.longest)
    else:
        total, items = token_loss.sum(), float(token_loss.numel())
    return total / (max(items, 1.0) if cfg.num_items_in_batch is None else cfg.num_items_in_batch)


def _metrics(ratio: Tensor, advantages: Tensor, cfg: PolicyLossConfig) -> PolicyMetrics:
    low, high = _cut_off(ratio, advantages, cfg)
    low = low & (cfg.loss_type != "cispo")
    return PolicyMetrics(
        clip_low=_mean(low),
        clip_high=_mean(high),
        clip_region=_mean(low | high),
        ratio_mean=_mean(ratio),
        ratio_min=ratio.amin() if ratio.numel() else ratio.sum(),
        ratio_max=ratio.amax() if ratio.numel() else ratio.sum(),
        num_tokens=torch.tensor(float(ratio.numel()), device=ratio.device),
    )


def _mean(x: Tensor) -> Tensor:
    """The mean; 0 for an empty tensor."""
    x = x if x.is_floating_point() else x.float()
    return x.sum() / max(x.numel(), 1)
