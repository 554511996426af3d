"""From divergence to token weights: SGCD's rule, its ablations and its neighbours.

One definition serves all devices: tensor operations over the whole packed batch (`sgcd_kernels.packed`), and one scan
(`sgcd_kernels.spans`). Nothing waits for a GPU. Everything here is detached by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sgcd_kernels.credit_config import DEFAULT, CreditConfig
from sgcd_kernels.packed import Packed
from sgcd_kernels.registered.credit import as_arguments, register_credit
from sgcd_kernels.spans import find_spans
from sgcd_kernels.types import Credit
from sgcd_kernels.validation import check_bounds, check_cu_seqlens, check_device, check_tensor, per_token


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
    - permuted: the sgcd result shuffled within the sequence, by config.seed, the sequence's place in the batch and its
      number of eligible tokens

    Neighbours, with D = log_ratio, A = advantages and the parameters of `CreditConfig`:
    - gear (2605.11853): r = clip(-D / max(quantile(-D), d_floor), 0, 1), spans as above on r; the onset's r inside, a
      token's own outside (R); w = .5 + (.5 - r) sign A; W = a w + 1 - a / 2
    - rlsd (2604.03128): (1 - l) + l clip(exp(sign(A) D), 1 - e, 1 + e)
    - sc_grpo (2606.18810): K / (K + c), K = forward_kl, c = max(the sequence's P75 of K, 1e-4)
    - egrsd (2605.13255): clip(exp(sign(A) D), .8, 1.2) clip(1 - g H, .1, 1), H = H_q / its maximum in the sequence (R)
    - dgpo (2605.03327): T softmax(h H^k / tau), h = sqrt(1 - bhattacharyya), H = H_p / its maximum in the sequence (R),
      T the eligible tokens, so that the mean is 1
    - turn_level (common to GRSD and TurnSight, 2608.04007): 1 + e tanh(sign(A) z), m the mean of D in a turn,
      z = (m - mean m) / std m over the turns of the sequence (R), each counted once. Reads turn_ids; one turn: W = 1

    These may fall below 1, and `gamma` and `clip` do not apply. Their saliency is r for gear and 0 otherwise.

    Raises ValueError for shapes that do not fit, and for an input that the rule reads (`NEEDS`) and that is missing
    or holds a NaN or infinity at an eligible token. What it does not read may hold anything. On a GPU no value is
    looked at, because that would wait for it: W is NaN at such a token, and cu_seqlens must indeed rise from 0 to N.

    Gradients: none
    Backends: torch, its scan and quantiles by cpp and triton
    Cost: 0 U forward, 0 U backward

    >>> import torch
    >>> d = torch.tensor([0.0, 0.9, 0.0, 0.0, 0.0, 0.0])  # two sequences; the teacher disagrees at one token
    >>> entropy = torch.tensor([0.2, 0.2, 0.2, 0.9, 0.2, 0.2])  # and is unsure two tokens later
    >>> credit = credit_weights(d, entropy, torch.tensor([0, 4, 6]))
    >>> credit.weights.tolist(), credit.span_ids.tolist()
    ([1.0, 2.0, 2.0, 1.0, 1.0, 1.0], [-1, 0, 0, -1, -1, -1])
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
    return Credit(*_OP(*signals.values(), *as_arguments(config)))


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
    device, on_host = divergence.device, divergence.device.type == "cpu"
    values_at_hand = on_host or cu_seqlens.device.type == "cpu"
    cu = check_cu_seqlens(cu_seqlens, divergence.numel(), values=values_at_hand).to(device)
    eligible = torch.ones(divergence.shape, dtype=torch.bool, device=device)
    if mask is not None:
        eligible = per_token("mask", mask, divergence.shape, device) != 0
    packed = Packed(cu, eligible)
    given = {
        "divergence": divergence,
        "teacher_entropy": teacher_entropy,
        "advantages": _per_token_advantages(advantages, packed, divergence),
        "log_ratio": log_ratio,
        "forward_kl": forward_kl,
        "bhattacharyya": bhattacharyya,
        "student_entropy": student_entropy,
    }
    flat = {name: per_token(name, x, divergence.shape, device) for name, x in given.items() if x is not None}
    turns = None if turn_ids is None else per_token("turn_ids", turn_ids, divergence.shape, device).long().contiguous()
    read = {name: _needed(name, flat, config.rule) for name in NEEDS[config.rule]}
    if turns is None and config.rule == "turn_level":
        raise ValueError("turn_ids is None, needs one value a token for rule 'turn_level'")
    if on_host:
        _check_finite(read, eligible)
    dtype = torch.promote_types(divergence.dtype, torch.float32)
    inputs = {name: x.to(dtype).contiguous() for name, x in read.items()}
    outside = torch.zeros(divergence.shape, dtype=dtype, device=device)
    if config.rule == "none" or divergence.numel() == 0:
        return Credit(outside + 1, outside, torch.full_like(outside, -1, dtype=torch.long))
    weights, saliency, ids = RULES[config.rule](_Batch(inputs, turns, packed, outside), config)
    for x in inputs.values() if not on_host else ():
        weights = weights.masked_fill(~x.isfinite(), torch.nan)
    return Credit(
        torch.where(eligible, weights, 1.0).to(dtype),
        torch.where(eligible, saliency, 0.0).to(dtype),
        torch.where(eligible, ids, -1),
    )


_OP = register_credit(_compute)


@dataclass(frozen=True)
class _Batch:
    """All packed tokens; what rules give at ineligible ones is not looked at."""

    inputs: dict[str, Tensor]  # each [N]; only what the rule reads
    turns: Tensor | None  # [N]
    packed: Packed
    zeros: Tensor  # [N]

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]


Triple = tuple[Tensor, Tensor, Tensor]  # weights, saliency, span ids, each [N]


def check_config(config: object) -> None:
    if not isinstance(config, CreditConfig):
        raise ValueError(f"config is {config!r} ({type(config).__name__}), needs a CreditConfig")


def _needed(name: str, given: dict[str, Tensor], rule: str) -> Tensor:
    if name not in given:
        raise ValueError(f"{name} is None, needs one value a token for rule {rule!r}")
    return given[name]


def _check_finite(read: dict[str, Tensor], eligible: Tensor) -> None:
    for name, x in read.items():
        if count := int((eligible & ~x.isfinite()).sum()):
            raise ValueError(f"{name} holds {count} NaN or infinite values at eligible tokens, needs finite ones")


def _per_token_advantages(advantages: Tensor | None, packed: Packed, like: Tensor) -> Tensor | None:
    if advantages is None:
        return None
    if advantages.shape == like.shape:
        return advantages
    sequences = packed.lengths.numel()
    if advantages.shape != (sequences,):
        got, needs = list(advantages.shape), f"[{like.numel()}] (a token) or [{sequences}] (a sequence)"
        raise ValueError(f"advantages has shape {got}, needs {needs}")
    check_device("advantages", advantages, "divergence", like)
    return packed.spread(advantages)


def _normalise(d: Tensor, batch: _Batch, cfg: CreditConfig) -> Tensor:
    scale = batch.packed.quantile(d, cfg.quantile).clamp(min=cfg.d_floor)
    return (d / batch.packed.spread(scale)).clamp(0, 1)


def _spread_over_spans(u: Tensor, batch: _Batch, cfg: CreditConfig, outside: Tensor) -> tuple[Tensor, Tensor]:
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


def _sgcd(batch: _Batch, cfg: CreditConfig) -> Triple:
    u = _normalise(batch["divergence"], batch, cfg)
    saliency, ids = _spread_over_spans(u, batch, cfg, batch.zeros)
    return (1 + cfg.gamma * saliency).clamp(1, cfg.clip), saliency, ids


def _uniform(batch: _Batch, cfg: CreditConfig) -> Triple:
    weights, _, ids = _plain(torch.full_like(batch.zeros, min(1 + cfg.gamma, cfg.clip)))
    return weights, batch.zeros + 1, ids


def _matched_uniform(batch: _Batch, cfg: CreditConfig) -> Triple:
    weights, saliency, ids = _sgcd(batch, cfg)
    # The mean of equal numbers may round past them; the bounds of W must hold.
    weights, saliency = (batch.packed.spread(batch.packed.mean(x)) for x in (weights, saliency))
    return weights.clamp(1, cfg.clip), saliency, torch.full_like(ids, -1)


def _permuted(batch: _Batch, cfg: CreditConfig) -> Triple:
    to, source = batch.packed.shuffle(cfg.seed)
    weights, saliency, ids = (x.index_copy(0, to, x.index_select(0, source)) for x in _sgcd(batch, cfg))
    return weights, saliency, ids


def _gear(batch: _Batch, cfg: CreditConfig) -> Triple:
    own = _normalise(-batch["log_ratio"], batch, cfg)
    r, ids = _spread_over_spans(own, batch, cfg, own)
    w = 0.5 + (0.5 - r) * batch["advantages"].sign()
    return cfg.gear_alpha * w + 1 - cfg.gear_alpha / 2, r, ids


def _signed_ratio(batch: _Batch, epsilon: float) -> Tensor:
    return (batch["advantages"].sign() * batch["log_ratio"]).exp().clamp(1 - epsilon, 1 + epsilon)


def _rlsd(batch: _Batch, cfg: CreditConfig) -> Triple:
    return _plain((1 - cfg.rlsd_lambda) + cfg.rlsd_lambda * _signed_ratio(batch, cfg.rlsd_epsilon))


def _sc_grpo(batch: _Batch, cfg: CreditConfig) -> Triple:
    kl = batch["forward_kl"]
    scale = batch.packed.quantile(kl, cfg.sc_grpo_quantile).clamp(min=cfg.sc_grpo_floor)
    return _plain(kl / (kl + batch.packed.spread(scale)))


def _egrsd(batch: _Batch, cfg: CreditConfig) -> Triple:
    calm = (1 - cfg.egrsd_gamma * _share_of_maximum(batch["teacher_entropy"], batch)).clamp(cfg.egrsd_floor, 1)
    return _plain(_signed_ratio(batch, cfg.egrsd_epsilon) * calm)


def _dgpo(batch: _Batch, cfg: CreditConfig) -> Triple:
    packed = batch.packed
    hellinger = (1 - batch["bhattacharyya"]).clamp(min=0).sqrt()
    score = hellinger * _share_of_maximum(batch["student_entropy"], batch) ** cfg.dgpo_kappa / cfg.dgpo_tau
    e = (score - packed.spread(packed.maximum(score))).exp()
    return _plain(e * packed.spread((packed.tokens / packed.total(e)).to(e.dtype)))


def _turn_level(batch: _Batch, cfg: CreditConfig) -> Triple:
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


def _share_of_maximum(entropy: Tensor, batch: _Batch) -> Tensor:
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
RULES: dict[str, Callable[[_Batch, CreditConfig], Triple]] = {
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
