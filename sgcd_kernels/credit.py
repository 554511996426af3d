"""From divergence to token weights: SGCD's rule, its ablations and its neighbours.

One definition serves all backends: the work is O(N) and small beside one product with the head. Everything here is
detached by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sgcd_kernels.credit_config import DEFAULT, CreditConfig
from sgcd_kernels.registered.credit import packed, register_credit
from sgcd_kernels.spans import find_spans
from sgcd_kernels.types import Credit
from sgcd_kernels.validation import check_bounds, check_cu_seqlens, check_tensor, per_token


@torch.no_grad()
def credit_weights(
    divergence: Tensor,  # [N], d
    teacher_entropy: Tensor,  # [N], H_q
    cu_seqlens: Tensor,  # [B + 1]
    *,
    mask: Tensor | None = None,  # [N], true where a token may carry credit
    turn_ids: Tensor | None = None,  # [N]
    advantages: Tensor | None = None,  # [N] or [B]
    log_ratio: Tensor | None = None,  # [N], Delta = log q(y) - log p(y)
    forward_kl: Tensor | None = None,  # [N], KL(q || p)
    bhattacharyya: Tensor | None = None,  # [N]
    student_entropy: Tensor | None = None,  # [N], H_p
    config: CreditConfig = DEFAULT,
) -> Credit:
    """Token weights W, saliency s and span ids, each [N]; never a gradient. Tokens outside `mask`: W 1, s 0, span -1.

    sgcd (arXiv 2606.12634), over a sequence's eligible tokens: u = clip(d / max(quantile(d), d_floor), 0, 1), spans by
    `sgcd_kernels.spans`, s = u at the span's onset (or each token's own) inside and 0 outside,
    W = clip(1 + gamma s, 1, clip). Spans cross neither sequences nor turns; a hole in the mask does not end one.

    Ablations:
    - none: W = 1
    - uniform: s = 1, W = min(1 + gamma, clip)
    - matched_uniform: W = the mean sgcd W of the sequence's eligible tokens
    - permuted: the sgcd result shuffled within the sequence, by config.seed and the sequence's place in the batch

    Neighbours, with D = log_ratio, A = advantages and the parameters of `CreditConfig`:
    - gear (2605.11853): r = clip(-D / max(quantile(-D), d_floor), 0, 1), spans as above on r; the onset's r inside, a
      token's own outside (R); w = .5 + (.5 - r) sign A; W = a w + 1 - a / 2
    - rlsd (2604.03128): (1 - l) + l clip(exp(sign(A) D), 1 - e, 1 + e)
    - sc_grpo (2606.18810): K / (K + c), K = forward_kl, c = max(the sequence's P75 of K, 1e-4)
    - egrsd (2605.13255): clip(exp(sign(A) D), .8, 1.2) clip(1 - g H, .1, 1), H = H_q / its maximum in the sequence (R)
    - dgpo (2605.03327): T softmax(h H^k / tau), h = sqrt(1 - bhattacharyya), H = H_p / its maximum in the sequence (R),
      T the eligible tokens, so that the mean is 1

    These may fall below 1, and `gamma` and `clip` do not apply. Their saliency is r for gear and 0 otherwise.

    Raises ValueError for shapes that do not fit, and for an input that the rule reads (`NEEDS`) and that is missing or
    holds a NaN or infinity at an eligible token. What it does not read may hold anything.
    """
    check_config(config)
    check_bounds(cu_seqlens)
    signals = {
        "divergence": divergence,
        "teacher_entropy": teacher_entropy,
        "cu_seqlens": cu_seqlens,
        "mask": mask,
        "turn_ids": turn_ids,
        "advantages": advantages,
        "log_ratio": log_ratio,
        "forward_kl": forward_kl,
        "bhattacharyya": bhattacharyya,
        "student_entropy": student_entropy,
    }
    for name, value in signals.items():
        if value is not None or name == "divergence":
            check_tensor(name, value)
    return Credit(*_OP(*signals.values(), *packed(config)))


def _compute(
    divergence: Tensor,
    teacher_entropy: Tensor | None,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None,
    turn_ids: Tensor | None,
    advantages: Tensor | None,
    log_ratio: Tensor | None,
    forward_kl: Tensor | None,
    bhattacharyya: Tensor | None,
    student_entropy: Tensor | None,
    config: CreditConfig,
) -> Credit:
    """What `credit_weights` says."""
    if divergence.dim() != 1:
        raise ValueError(f"divergence has shape {list(divergence.shape)}, needs packed [N]")
    cu = check_cu_seqlens(cu_seqlens, divergence.numel())
    device = divergence.device
    dtype = torch.promote_types(divergence.dtype, torch.float32)
    given = {
        "divergence": divergence,
        "teacher_entropy": teacher_entropy,
        "advantages": _per_token_advantages(advantages, cu, divergence),
        "log_ratio": log_ratio,
        "forward_kl": forward_kl,
        "bhattacharyya": bhattacharyya,
        "student_entropy": student_entropy,
    }
    flat = {name: per_token(name, x, divergence.shape, device) for name, x in given.items() if x is not None}
    keep = torch.ones(divergence.shape, dtype=torch.bool)
    if mask is not None:
        keep = per_token("mask", mask, divergence.shape, device).cpu() != 0
    read = {name: _finite(name, flat.get(name), keep, config.rule) for name in NEEDS[config.rule]}
    turns = None if turn_ids is None else per_token("turn_ids", turn_ids, divergence.shape, device).cpu()
    out = Credit(
        torch.ones(divergence.numel(), dtype=dtype),
        torch.zeros(divergence.numel(), dtype=dtype),
        torch.full((divergence.numel(),), -1, dtype=torch.long),
    )
    spans = 0
    bounds = cu.tolist()
    for index, (start, stop) in enumerate(pairwise(bounds)):
        at = start + keep[start:stop].nonzero().squeeze(1)
        if at.numel() == 0 or config.rule == "none":
            continue
        sequence = _Sequence(
            {name: value[at].to(dtype) for name, value in read.items()},
            None if turns is None else turns[at].tolist(),
            index,
            at.numel(),
        )
        weights, saliency, ids = RULES[config.rule](sequence, config)
        out.weights[at], out.saliency[at] = weights.to(dtype), saliency.to(dtype)
        out.span_ids[at] = torch.where(ids >= 0, ids + spans, -1)
        spans += int(ids.max()) + 1
    return Credit(*(x.to(device) for x in out))


_OP = register_credit(_compute)


@dataclass(frozen=True)
class _Sequence:
    """The eligible tokens of one sequence, on the CPU."""

    inputs: dict[str, Tensor]  # each [T]; only what the rule reads
    turns: list[int] | None
    index: int
    tokens: int  # T

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]


Triple = tuple[Tensor, Tensor, Tensor]  # weights, saliency, span ids, each [T]


def check_config(config: object) -> None:
    if not isinstance(config, CreditConfig):
        raise ValueError(f"config is {config!r} ({type(config).__name__}), needs a CreditConfig")


def _finite(name: str, value: Tensor | None, keep: Tensor, rule: str) -> Tensor:
    """On the CPU, finite at eligible tokens."""
    if value is None:
        raise ValueError(f"{name} is None, needs one value a token for rule {rule!r}")
    value = value.cpu()
    broken = int((~value.isfinite() & keep).sum())
    if broken:
        raise ValueError(f"{name} holds {broken} NaN or infinite values at eligible tokens, needs finite ones")
    return value


def _per_token_advantages(advantages: Tensor | None, cu: Tensor, like: Tensor) -> Tensor | None:
    if advantages is None:
        return None
    check_tensor("advantages", advantages)
    if advantages.shape == like.shape:
        return advantages
    if advantages.shape != (cu.numel() - 1,):
        got, needs = list(advantages.shape), f"[{like.numel()}] (a token) or [{cu.numel() - 1}] (a sequence)"
        raise ValueError(f"advantages has shape {got}, needs {needs}")
    return advantages.repeat_interleave(cu.diff().to(advantages.device))


def _normalise(d: Tensor, cfg: CreditConfig) -> Tensor:
    scale = torch.quantile(d, cfg.quantile).clamp(min=cfg.d_floor)
    return (d / scale).clamp(0, 1)


def _spread_over_spans(u: Tensor, seq: _Sequence, cfg: CreditConfig, outside: Tensor) -> tuple[Tensor, Tensor]:
    """(saliency, span ids)"""
    values, ids = outside.clone(), torch.full(u.shape, -1, dtype=torch.long)
    for number, (onset, end) in enumerate(find_spans(u.tolist(), seq["teacher_entropy"].tolist(), seq.turns, cfg)):
        values[onset:end] = u[onset] if cfg.span_value == "onset" else u[onset:end]
        ids[onset:end] = number
    return values, ids


def _plain(weights: Tensor) -> Triple:
    """A rule without saliency or spans."""
    return weights, torch.zeros_like(weights), torch.full(weights.shape, -1, dtype=torch.long)


def _sgcd(seq: _Sequence, cfg: CreditConfig) -> Triple:
    u = _normalise(seq["divergence"], cfg)
    saliency, ids = _spread_over_spans(u, seq, cfg, torch.zeros_like(u))
    return (1 + cfg.gamma * saliency).clamp(1, cfg.clip), saliency, ids


def _uniform(seq: _Sequence, cfg: CreditConfig) -> Triple:
    ones = torch.ones(seq.tokens, dtype=torch.float64)  # rounded once, to the dtype of the results
    return ones * min(1 + cfg.gamma, cfg.clip), ones, torch.full(ones.shape, -1, dtype=torch.long)


def _matched_uniform(seq: _Sequence, cfg: CreditConfig) -> Triple:
    weights, saliency, ids = _sgcd(seq, cfg)
    # The mean of equal numbers may round past them; the bounds of W must hold.
    mean = weights.mean().clamp(weights.min(), weights.max())
    return mean.expand_as(weights), saliency.mean().expand_as(saliency), torch.full_like(ids, -1)


def _permuted(seq: _Sequence, cfg: CreditConfig) -> Triple:
    weights, saliency, ids = _sgcd(seq, cfg)
    generator = torch.Generator().manual_seed((cfg.seed * 1_000_003 + seq.index) % (1 << 63))
    order = torch.randperm(weights.numel(), generator=generator)
    return weights[order], saliency[order], ids[order]


def _gear(seq: _Sequence, cfg: CreditConfig) -> Triple:
    own = _normalise(-seq["log_ratio"], cfg)
    r, ids = _spread_over_spans(own, seq, cfg, own)
    w = 0.5 + (0.5 - r) * seq["advantages"].sign()
    return cfg.gear_alpha * w + 1 - cfg.gear_alpha / 2, r, ids


def _signed_ratio(seq: _Sequence, epsilon: float) -> Tensor:
    return (seq["advantages"].sign() * seq["log_ratio"]).exp().clamp(1 - epsilon, 1 + epsilon)


def _rlsd(seq: _Sequence, cfg: CreditConfig) -> Triple:
    return _plain((1 - cfg.rlsd_lambda) + cfg.rlsd_lambda * _signed_ratio(seq, cfg.rlsd_epsilon))


def _sc_grpo(seq: _Sequence, cfg: CreditConfig) -> Triple:
    kl = seq["forward_kl"]
    return _plain(kl / (kl + torch.quantile(kl, cfg.sc_grpo_quantile).clamp(min=cfg.sc_grpo_floor)))


def _egrsd(seq: _Sequence, cfg: CreditConfig) -> Triple:
    calm = (1 - cfg.egrsd_gamma * _share_of_maximum(seq["teacher_entropy"])).clamp(cfg.egrsd_floor, 1)
    return _plain(_signed_ratio(seq, cfg.egrsd_epsilon) * calm)


def _dgpo(seq: _Sequence, cfg: CreditConfig) -> Triple:
    hellinger = (1 - seq["bhattacharyya"]).clamp(min=0).sqrt()
    score = hellinger * _share_of_maximum(seq["student_entropy"]) ** cfg.dgpo_kappa / cfg.dgpo_tau
    return _plain(score.softmax(0) * score.numel())


def _share_of_maximum(entropy: Tensor) -> Tensor:
    return entropy / entropy.max().clamp(min=1e-6)


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
}
USE_GAMMA = ("sgcd", "uniform", "matched_uniform", "permuted")
RULES: dict[str, Callable[[_Sequence, CreditConfig], Triple]] = {
    "sgcd": _sgcd,
    "uniform": _uniform,
    "matched_uniform": _matched_uniform,
    "permuted": _permuted,
    "gear": _gear,
    "rlsd": _rlsd,
    "sc_grpo": _sc_grpo,
    "egrsd": _egrsd,
    "dgpo": _dgpo,
}
