"""From divergence to token weights: SGCD's rule, its ablations and its neighbours.

One definition serves all devices (`sgcd_kernels.credit_rules`). Nothing waits for a GPU. Everything here is detached by
construction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.credit_config import DEFAULT, CreditConfig
from sgcd_kernels.credit_rules import NEEDS, RULES, Batch
from sgcd_kernels.packed import Packed
from sgcd_kernels.registered.credit import as_arguments, register_credit
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

    Raises ValueError for shapes that do not fit, and for an input that the rule reads (`credit_rules.NEEDS`) and that
    is missing or holds a NaN or infinity at an eligible token. What it does not read may hold anything. On a GPU no
    value is looked at, because that would wait for it: W is NaN at such a token, and cu_seqlens must indeed rise from
    0 to N.

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
    weights, saliency, ids = RULES[config.rule](Batch(inputs, turns, packed, outside), config)
    for x in inputs.values() if not on_host else ():
        weights = weights.masked_fill(~x.isfinite(), torch.nan)
    return Credit(
        torch.where(eligible, weights, 1.0).to(dtype),
        torch.where(eligible, saliency, 0.0).to(dtype),
        torch.where(eligible, ids, -1),
    )


_OP = register_credit(_compute)


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
