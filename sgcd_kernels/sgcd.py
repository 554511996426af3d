"""All of SGCD in one call: score student and teacher, turn divergence into credit, take the weighted policy loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.backends import IMPLS
from sgcd_kernels.credit import check_config, credit_weights
from sgcd_kernels.credit_config import DEFAULT, CreditConfig
from sgcd_kernels.credit_rules import USE_GAMMA
from sgcd_kernels.divergence import linear_divergence
from sgcd_kernels.policy_loss import check_batch, check_options, check_sequences, linear_policy_loss
from sgcd_kernels.registered import sgcd as registered
from sgcd_kernels.shard import name_of
from sgcd_kernels.types import DivergenceStats
from sgcd_kernels.validation import (
    check_advantages,
    check_choice,
    check_hidden,
    check_int,
    check_per_token,
    check_targets,
    check_weight,
)


def sgcd_loss(
    hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    teacher_hidden: Tensor,  # [N, H'] or [B, T, H']
    advantages: Tensor,  # like targets, or [B]
    cu_seqlens: Tensor | None = None,  # [B + 1], for packed hidden
    mask: Tensor | None = None,  # like targets; true where a token has a loss
    *,
    credit_mask: Tensor | None = None,  # like targets; true where a loss token may carry credit
    turn_ids: Tensor | None = None,  # like targets
    teacher_weight: Tensor | None = None,  # [V, H']
    old_logp: Tensor | None = None,  # like targets
    ref_logp: Tensor | None = None,  # like targets
    importance_weights: Tensor | None = None,  # like targets
    config: CreditConfig = DEFAULT,
    loss_type: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,  # or one a token
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    ignore_index: int = -100,
    num_items_in_batch: float | Tensor | None = None,
    reuse_lse: bool = False,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_policy_loss` with advantages A W, W from `credit_weights` of `linear_divergence` (arXiv 2606.12634).

    The teacher is the same policy under the credit reference, aligned token by token with the student. It is scored,
    never trained.
    Answer-bearing literals and sequences without a reference are left out of `credit_mask`: they keep W = 1. Where
    every W is 1 (for rule "sgcd": gamma 0 or no divergence) loss and gradient are bitwise those of
    `linear_policy_loss`; `reuse_lse=True` saves one of six products by taking the scoring pass's normaliser, at the
    price of that last bit.

    A span of credit ends with its turn. Without `turn_ids` every run of loss tokens is a turn, so that no span reaches
    past a tool's answer; if the hidden states are of generated tokens only, such runs touch, and `turn_ids` must tell.

    Metrics are those of the policy loss, `entropy` and `credit/*`: mean_divergence, mean_weight, frac_salient (s > 0),
    frac_saturated (W at its ceiling), num_spans, mean_span_length, teacher_entropy, inert. `credit/inert` is 1 when all
    d are 0 or all W are 1 over eligible tokens; if the rule was meant to do something, a RuntimeWarning says so too.
    With no eligible token mean_weight is 1 and inert 0.

    Gradients: hidden, weight, bias
    Backends: triton, cpp, torch
    Cost: 6 U forward, 0 U backward; with reuse_lse 5 U forward, 0 U backward

    Raises ValueError as the three ops do.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> hidden, teacher, weight = (torch.randn(n, 4, generator=g) for n in (6, 6, 10))
    >>> targets, cu_seqlens = torch.randint(10, (6,), generator=g), torch.tensor([0, 3, 6])
    >>> advantages = torch.tensor([1.0, -1.0])  # one a sequence
    >>> turn_ids = torch.tensor([0, 0, 1, 0, 0, 0])
    >>> batch = (hidden.requires_grad_(), weight, targets, teacher, advantages, cu_seqlens)
    >>> loss, metrics = sgcd_loss(*batch, turn_ids=turn_ids)
    >>> loss.backward()
    >>> bool(metrics["credit/mean_weight"] > 1), metrics["credit/inert"].item()
    (True, 0.0)
    """
    # Whatever can be refused is refused before the first product.
    check_config(config)
    check_options(loss_type, epsilon, epsilon_high, beta)
    check_batch(num_items_in_batch, beta, ref_logp)
    check_choice("impl", impl, IMPLS)
    check_int("ignore_index", ignore_index)
    leading = check_hidden("hidden", hidden)
    check_weight("weight", weight, "hidden", hidden)
    check_targets(targets, leading, hidden.device, mask)
    given = {"credit_mask": credit_mask, "turn_ids": turn_ids, "old_logp": old_logp, "ref_logp": ref_logp}
    check_per_token(given | {"importance_weights": importance_weights}, leading, hidden.device)
    bounds = _sequence_bounds(leading, cu_seqlens)
    check_advantages(advantages, leading, check_sequences(leading, cu_seqlens, loss_type))
    with torch.no_grad():
        targets, eligible, turns, per_token = registered.inputs_op(
            weight, targets, advantages, cu_seqlens, mask, credit_mask, ignore_index, name_of(group)
        )
    stats = linear_divergence(
        hidden,
        weight,
        targets,
        teacher_hidden,
        teacher_weight,
        bias=bias,
        teacher_bias=teacher_bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        impl=impl,
        group=group,
    )
    loss_tokens = targets != ignore_index
    weighted, credit_metrics = _weighted(stats, per_token, bounds, loss_tokens, eligible, turn_ids, turns, config)
    loss, metrics = linear_policy_loss(
        hidden,
        weight,
        targets,
        weighted.reshape(leading),
        old_logp=old_logp,
        cu_seqlens=cu_seqlens,
        loss_type=loss_type,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        beta=beta,
        ref_logp=ref_logp,
        importance_weights=importance_weights,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        ignore_index=ignore_index,
        lse=stats.student_lse if reuse_lse else None,
        num_items_in_batch=num_items_in_batch,
        impl=impl,
        group=group,
    )
    return loss, metrics | dict(zip(registered.METRICS, credit_metrics.unbind(), strict=True))


def _weighted(
    stats: DivergenceStats,
    advantages: Tensor,  # [N]
    bounds: Tensor,  # [B + 1]
    loss_tokens: Tensor,  # like targets, bool
    eligible: Tensor,  # like targets, bool
    turn_ids: Tensor | None,  # like targets
    runs: Tensor,  # [N], what turns are where `turn_ids` does not tell
    config: CreditConfig,
) -> tuple[Tensor, Tensor]:
    """(A W [N], the metrics of the credit in the order of `registered.METRICS`)"""
    flat = DivergenceStats(*(None if x is None else x.reshape(-1) for x in stats))  # type: ignore[arg-type]
    credit = credit_weights(
        flat.reverse_kl,
        flat.teacher_entropy,
        bounds,
        mask=eligible.reshape(-1),
        turn_ids=runs if turn_ids is None else turn_ids.reshape(-1),
        advantages=advantages,
        log_ratio=flat.teacher_logp - flat.student_logp,
        forward_kl=flat.forward_kl,
        bhattacharyya=flat.bhattacharyya,
        student_entropy=flat.student_entropy,
        config=config,
    )
    idle = config.rule == "none" or (config.rule in USE_GAMMA and config.gamma == 0)
    masks = (loss_tokens.reshape(-1), eligible.reshape(-1))
    signals = (flat.reverse_kl, flat.student_entropy, flat.teacher_entropy)
    made: tuple[Tensor, Tensor] = registered.weigh_op(advantages, *credit, *signals, *masks, float(config.clip), idle)
    return made


def _sequence_bounds(leading: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Credit is normalised and cut within a rollout, so packed tokens must say where one begins."""
    if cu_seqlens is not None:
        return cu_seqlens
    if len(leading) == 1:
        raise ValueError("cu_seqlens is None, needs [B + 1] for packed hidden [N, H]: credit stays within a sequence")
    return torch.arange(leading[0] + 1) * leading[1]
