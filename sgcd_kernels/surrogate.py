"""The GRPO family as a function of log p(y) alone: the one definition of the loss, shared by every backend.

Per token, with the ratio r = exp(logp - old_logp), advantage A, and both clip bounds around 1:

    grpo, bnpo, dr_grpo, dapo   -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)     PPO, arXiv 1707.06347
    gspo                        the same with r the sequence's geometric mean ratio, its gradient through the token
                                (GSPO-token, arXiv 2507.18071 eq. 14): equal to GSPO when A is constant in a sequence
    cispo                       -stop_gradient(min(r, 1 + epsilon_high)) A logp          MiniMax-M1, arXiv 2506.13585

times the importance weight, plus beta (exp(d) - d - 1) with d = ref_logp - logp (the k3 estimate of KL(p || ref)).
ln r and d stop at 20, far beyond any clip: there the term is constant, where the exp would overflow, and 0 times its
infinite slope make the gradient NaN.
Sums are divided by

    grpo, gspo          each sequence's loss tokens, then the number of sequences
    bnpo, dapo, cispo   the number of loss tokens
    dr_grpo             sequences x longest sequence (arXiv 2503.20783 asks for a constant: give num_items_in_batch)

where `num_items_in_batch` replaces the last divisor, so that micro-batches sum to the whole batch's loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_EXPONENT = 20.0
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo")
PER_SEQUENCE = ("grpo", "gspo", "dr_grpo")  # these need to know where sequences begin


@dataclass(frozen=True)
class Surrogate:
    """What stays fixed over the tokens."""

    loss_type: str
    epsilon: float
    epsilon_high: float
    beta: float
    num_items_in_batch: float | None


@dataclass(frozen=True)
class Segments:
    """Which sequence each loss token belongs to."""

    ids: Tensor  # [n] int64, rising
    count: int
    longest: int  # tokens, masked ones too

    def mean(self, x: Tensor) -> Tensor:  # [n] -> [count]
        """Mean of each sequence; 0 for one without loss tokens."""
        # Not bincount, which waits for a GPU to say how long its result is.
        tokens = torch.searchsorted(self.ids, torch.arange(self.count + 1, device=self.ids.device)).diff()
        # Not index_add, whose order of summation, and so whose last bit, varies from run to run on CUDA.
        return torch.segment_reduce(x, "sum", lengths=tokens, unsafe=True) / tokens.clamp(min=1)


def surrogate_loss(
    logp: Tensor,  # [n]
    advantages: Tensor,  # [n]
    segments: Segments,
    cfg: Surrogate,
    old_logp: Tensor | None = None,  # [n]; None is on-policy
    ref_logp: Tensor | None = None,  # [n]
    importance_weights: Tensor | None = None,  # [n]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, differentiable in `logp`, and its metrics."""
    ratio = _ratio(logp, logp.detach() if old_logp is None else old_logp, segments, cfg)
    token_loss = _policy_term(logp, ratio, advantages, cfg)
    if importance_weights is not None:
        token_loss = token_loss * importance_weights
    metrics = _clip_metrics(ratio.detach(), advantages, cfg)
    if ref_logp is not None and cfg.beta != 0:
        gap = (ref_logp - logp).clamp(max=MAX_EXPONENT)
        kl = gap.exp() - gap - 1
        token_loss = token_loss + cfg.beta * kl
        metrics["kl"] = _mean(kl.detach())
    return _reduce(token_loss, segments, cfg), metrics


def _ratio(logp: Tensor, old_logp: Tensor, segments: Segments, cfg: Surrogate) -> Tensor:
    log_ratio = logp - old_logp
    if cfg.loss_type == "gspo":
        sequence = segments.mean(log_ratio.detach())[segments.ids]
        log_ratio = sequence + logp - logp.detach()
    return log_ratio.clamp(max=MAX_EXPONENT).exp()


def _policy_term(logp: Tensor, ratio: Tensor, advantages: Tensor, cfg: Surrogate) -> Tensor:
    if cfg.loss_type == "cispo":
        return -ratio.detach().clamp(max=1 + cfg.epsilon_high) * advantages * logp
    clipped = ratio.clamp(1 - cfg.epsilon, 1 + cfg.epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _reduce(token_loss: Tensor, segments: Segments, cfg: Surrogate) -> Tensor:
    if cfg.loss_type in ("grpo", "gspo"):
        total, items = segments.mean(token_loss).sum(), float(segments.count)
    elif cfg.loss_type == "dr_grpo":
        total, items = token_loss.sum(), float(segments.count * segments.longest)
    else:
        total, items = token_loss.sum(), float(token_loss.numel())
    return total / (max(items, 1.0) if cfg.num_items_in_batch is None else cfg.num_items_in_batch)


def _clip_metrics(ratio: Tensor, advantages: Tensor, cfg: Surrogate) -> dict[str, Tensor]:
    low = (ratio < 1 - cfg.epsilon) & (advantages < 0) & (cfg.loss_type != "cispo")
    high = (ratio > 1 + cfg.epsilon_high) & (advantages > 0)
    return {
        "clip_ratio/low_mean": _mean(low),
        "clip_ratio/high_mean": _mean(high),
        "clip_ratio/region_mean": _mean(low | high),
        "ratio/mean": _mean(ratio),
        "ratio/min": ratio.amin() if ratio.numel() else ratio.sum(),
        "ratio/max": ratio.amax() if ratio.numel() else ratio.sum(),
        "num_tokens": torch.tensor(float(ratio.numel()), device=ratio.device),
    }


def _mean(x: Tensor) -> Tensor:
    """Mean; 0 of nothing."""
    x = x if x.is_floating_point() else x.float()
    return x.sum() / max(x.numel(), 1)
