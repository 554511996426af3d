"""`credit_weights`: one definition for all devices (`credit.rules`), without gradients or waiting for the GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sgcd_kernels.backends.protocol import IMPLS
from sgcd_kernels.backends.registry import credit_backend
from sgcd_kernels.core.lm_head import stats_dtype
from sgcd_kernels.core.registration import register
from sgcd_kernels.core.validation import (
    FLAGS,
    NUMBERS,
    check_all_per_token,
    check_choice,
    check_cu_seqlens,
    check_numeric,
    check_per_token,
    check_per_token_or_sequence,
    check_tensor,
    cu_seqlens_values,
)
from sgcd_kernels.credit.config import DEFAULT, CreditConfig, check_config
from sgcd_kernels.credit.eligible import EligibleTokens
from sgcd_kernels.credit.rules import RULES, Batch, Credit


class CreditSignals(NamedTuple):
    """The inputs of the rules, each [N]; advantages may be [B]."""

    divergence: Tensor
    teacher_entropy: Tensor | None
    advantages: Tensor | None
    log_ratio: Tensor | None
    forward_kl: Tensor | None
    bhattacharyya: Tensor | None
    student_entropy: Tensor | None


def credit_weights(
    divergence: Tensor,  # [N], d
    teacher_entropy: Tensor,  # [N], H_q
    cu_seqlens: Tensor,  # [B + 1]
    *,
    mask: Tensor | None = None,  # [N], true where a token may carry credit
    turn_ids: Tensor | None = None,  # [N]
    advantages: Tensor | None = None,  # [N] or [B]
    log_ratio: Tensor | None = None,  # [N], D = log q(y) - log p(y)
    forward_kl: Tensor | None = None,  # [N], KL(q || p)
    bhattacharyya: Tensor | None = None,  # [N]
    student_entropy: Tensor | None = None,  # [N], H_p
    config: CreditConfig = DEFAULT,
    impl: str = "auto",
) -> Credit:
    """Token weights W, saliency s and span ids, each [N], without gradients. Outside `mask` W = 1, s = 0, span -1.

    sgcd (arXiv 2606.12634), over the eligible tokens of a sequence: u = clip(d / max(quantile(d), d_floor), 0, 1). A
    span starts at a token with u > start. It ends before a token whose teacher entropy is above
    max(entropy_ratio H_onset, H_onset + entropy_margin), before the `patience`-th token in a row with u < reset, and
    where its turn or sequence ends; tokens outside the mask do not end it. Inside a span, s is the u of its onset (or,
    with span_value "own", each token's u); outside, s = 0. W = clip(1 + gamma s, 1, clip).

    Ablations:
    - none: W = 1
    - uniform: s = 1, W = min(1 + gamma, clip)
    - matched_uniform: W = the mean sgcd W of the sequence's eligible tokens
    - permuted: the sgcd result shuffled within the sequence; the order depends on config.seed, the sequence's place in
      the batch and its number of eligible tokens

    Related methods, with D = log_ratio, A = advantages and the parameters of `CreditConfig`:
    - gear (2605.11853): r = clip(-D / max(quantile(-D), d_floor), 0, 1), with spans of r as above; inside a span r is
      that of its onset (R); w = .5 + (.5 - r) sign A; W = a w + 1 - a / 2
    - rlsd (2604.03128): (1 - l) + l clip(exp(sign(A) D), 1 - e, 1 + e)
    - sc_grpo (2606.18810): K / (K + c), K = forward_kl, c = max(the sequence's P75 of K, 1e-4)
    - egrsd (2605.13255): clip(exp(sign(A) D), .8, 1.2) clip(1 - g H, .1, 1), H = H_q / its maximum in the sequence (R)
    - dgpo (2605.03327): T softmax(h H^k / tau), h = sqrt(1 - bhattacharyya), H = H_p / its maximum in the sequence (R),
      T the eligible tokens, so that the mean is 1
    - turn_level (common to GRSD and TurnSight, 2608.04007): 1 + e tanh(sign(A) z), m the mean of D in a turn,
      z = (m - mean m) / std m over the turns of the sequence (R), each counted once. Reads turn_ids; one turn: W = 1

    These weights may fall below 1, and `gamma` and `clip` do not apply. Saliency is r for gear and 0 otherwise.

    Raises ValueError for shapes that do not fit, and if a signal that the rule reads (`credit.rules.RULES`) is missing
    or holds a NaN or infinity at an eligible token; other signals may hold anything. Values on a GPU are not checked,
    because the host would have to wait: W is then NaN at such a token, and cu_seqlens is assumed to rise from 0 to N.

    Gradients: none
    Backends: torch; the span scan and the quantiles by `impl`
    Cost: 0 U forward, 0 U backward

    >>> import torch
    >>> d = torch.tensor([0.0, 0.9, 0.0, 0.0, 0.0, 0.0])  # two sequences; the teacher disagrees at one token
    >>> entropy = torch.tensor([0.2, 0.2, 0.2, 0.9, 0.2, 0.2])  # and is uncertain two tokens later
    >>> credit = credit_weights(d, entropy, torch.tensor([0, 4, 6]))
    >>> credit.weights.tolist(), credit.span_ids.tolist()
    ([1.0, 2.0, 2.0, 1.0, 1.0, 1.0], [-1, 0, 0, -1, -1, -1])
    """
    check_config(config)
    check_choice("impl", impl, IMPLS)
    signals = CreditSignals(
        divergence, teacher_entropy, advantages, log_ratio, forward_kl, bhattacharyya, student_entropy
    )
    _check_inputs(signals, cu_seqlens, mask, turn_ids, config)
    signals = CreditSignals(*(None if x is None else x.detach() for x in signals))  # type: ignore[arg-type]
    return credit_op(signals, cu_seqlens, mask, turn_ids, config_for_op(config), impl, "")


def _check_inputs(
    signals: CreditSignals, cu_seqlens: Tensor, mask: Tensor | None, turn_ids: Tensor | None, config: CreditConfig
) -> None:
    divergence, like = signals.divergence, ("divergence", signals.divergence)
    check_tensor(*like)
    if divergence.dim() != 1:
        raise ValueError(f"divergence has shape {list(divergence.shape)}, needs packed [N]")
    check_numeric(*like, NUMBERS)
    shape, device = divergence.shape, divergence.device
    check_cu_seqlens(cu_seqlens, *like)
    check_per_token("mask", mask, shape, device, FLAGS)
    check_per_token("turn_ids", turn_ids, shape, device)
    given = signals._asdict()
    for name in RULES[config.rule].reads:
        if (given | {"turn_ids": turn_ids})[name] is None:
            raise ValueError(f"{name} is None, needs one value per token for rule {config.rule!r}")
    advantages = given.pop("advantages")
    if advantages is not None:
        check_per_token_or_sequence("advantages", advantages, shape, cu_seqlens.numel() - 1, like)
    check_all_per_token(given, shape, device)


def config_for_op(config: CreditConfig) -> CreditConfig:
    """The same with its seed cut to 63 bits: integers of an op are int64. The rules use no more bits of it."""
    return replace(config, seed=config.seed % (1 << 63))


def _fake(signals: CreditSignals, *_: object) -> Credit:
    d, dtype = signals.divergence, stats_dtype(signals.divergence)
    weights, saliency = (d.new_empty(d.shape, dtype=dtype) for _ in range(2))
    return Credit(weights, saliency, d.new_empty(d.shape, dtype=torch.long))


@register(_fake)
def credit_op(
    signals: CreditSignals,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    turn_ids: Tensor | None,
    config: CreditConfig,
    impl: str,
    origin: str,
) -> Credit:
    """`origin` says in errors what the signals were computed from."""
    divergence, rule = signals.divergence, RULES[config.rule]
    shape, device, on_host = divergence.shape, divergence.device, divergence.device.type == "cpu"
    cu = cu_seqlens_values(cu_seqlens, divergence.numel(), look=on_host or cu_seqlens.device.type == "cpu").to(device)
    eligible = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask != 0
    turns = None if turn_ids is None else turn_ids.long()
    if turn_ids is not None and turns is not None and on_host and bool((turns != turn_ids).any()):
        raise ValueError(f"turn_ids holds {float(turn_ids[turns != turn_ids][0])}, needs whole numbers")
    tokens = EligibleTokens(cu, eligible, turns)
    given = signals._replace(advantages=_per_token(signals.advantages, tokens))._asdict()
    read = {name: value for name, value in given.items() if name in rule.reads}
    if on_host:
        _check_finite(read, eligible, origin)
    dtype = stats_dtype(divergence)
    inputs = {name: x.to(dtype) for name, x in read.items()}
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    if divergence.numel() == 0:
        return Credit(zeros, zeros.clone(), zeros.long())
    weights, saliency, ids = rule.compute(Batch(inputs, tokens, zeros, credit_backend(impl, divergence)), config)
    for x in inputs.values() if not on_host else ():
        weights = weights.masked_fill(~x.isfinite(), torch.nan)
    return Credit(
        torch.where(eligible, weights, 1.0).to(dtype),
        torch.where(eligible, saliency, 0.0).to(dtype),
        torch.where(eligible, ids, -1),
    )


def _check_finite(read: dict[str, Tensor], eligible: Tensor, origin: str) -> None:
    for name, x in read.items():
        if count := int((eligible & ~x.isfinite()).sum()):
            raise ValueError(
                f"{name}{origin} holds {count} NaN or infinite values at eligible tokens, needs finite ones"
            )


def _per_token(advantages: Tensor | None, tokens: EligibleTokens) -> Tensor | None:
    """Advantages per token, given per token or per sequence."""
    if advantages is None:
        return None
    advantages = advantages.to(tokens.eligible.device)
    return advantages if advantages.shape == tokens.eligible.shape else tokens.spread(advantages)
