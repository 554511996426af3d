"""All of SGCD in one call: score student and teacher, turn divergence into credit, take the weighted policy loss."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.backends import eager
from sgcd_kernels.credit import USE_GAMMA, check_config, credit_weights
from sgcd_kernels.credit_config import DEFAULT, CreditConfig
from sgcd_kernels.divergence import linear_divergence
from sgcd_kernels.policy_loss import check_options, linear_policy_loss, segments_of, spread
from sgcd_kernels.shard import shard_range
from sgcd_kernels.types import Credit, DivergenceStats
from sgcd_kernels.validation import check_hidden, check_targets, check_tensor, per_token


@eager
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
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    importance_weights: Tensor | None = None,
    config: CreditConfig = DEFAULT,
    loss_type: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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

    Metrics are those of the policy loss and `credit/*`: mean_divergence, mean_weight, frac_salient (s > 0),
    frac_saturated (W at its ceiling), num_spans, mean_span_length, teacher_entropy, inert. `credit/inert` is 1 when all
    d are 0 or all W are 1 over eligible tokens; if the rule was meant to do something, a RuntimeWarning says so too.
    With no eligible token mean_weight is 1 and inert 0.

    Raises ValueError as the three ops do.
    """
    # Whatever can be refused is refused before the first product.
    check_config(config)
    check_options(loss_type, epsilon, epsilon_high, beta, num_items_in_batch, ref_logp)
    leading = check_hidden("hidden", hidden)
    check_tensor("weight", weight)
    vocab = shard_range(weight, group)[1]
    targets = check_targets(targets, leading, hidden.device, vocab, ignore_index, mask).reshape(leading)
    loss_tokens = targets != ignore_index
    eligible = loss_tokens
    if credit_mask is not None:
        eligible = loss_tokens & (per_token("credit_mask", credit_mask, leading, hidden.device) != 0).reshape(leading)
    turns = _runs(loss_tokens)
    if turn_ids is not None:
        turns = per_token("turn_ids", turn_ids, leading, hidden.device)
    logps = {"old_logp": old_logp, "ref_logp": ref_logp, "importance_weights": importance_weights}
    for name, value in logps.items():
        if value is not None:
            per_token(name, value, leading, hidden.device)
    bounds = _sequence_bounds(leading, cu_seqlens)
    segments = segments_of(leading, cu_seqlens, loss_type, hidden.device)
    check_tensor("advantages", advantages)
    wide = torch.promote_types(advantages.dtype, torch.float32)
    per_token_advantages = spread(advantages, segments, leading, wide)
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
    credit = _credit(stats, bounds, eligible, turns, per_token_advantages, config)
    loss, metrics = linear_policy_loss(
        hidden,
        weight,
        targets,
        (per_token_advantages * credit.weights).reshape(leading),
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
    metrics["entropy"] = _mean(stats.student_entropy[loss_tokens])
    metrics.update(credit_metrics(stats, credit, eligible.reshape(-1), config))
    return loss, metrics


def _credit(
    stats: DivergenceStats,
    bounds: Tensor,
    eligible: Tensor,
    turns: Tensor,  # [N]
    advantages: Tensor,  # [N]
    config: CreditConfig,
) -> Credit:
    return credit_weights(
        stats.reverse_kl.reshape(-1),
        stats.teacher_entropy.reshape(-1),
        bounds,
        mask=eligible.reshape(-1),
        turn_ids=turns,
        advantages=advantages,
        log_ratio=(stats.teacher_logp - stats.student_logp).reshape(-1),
        forward_kl=stats.forward_kl.reshape(-1),
        bhattacharyya=stats.bhattacharyya.reshape(-1),
        student_entropy=stats.student_entropy.reshape(-1),
        config=config,
    )


def credit_metrics(stats: DivergenceStats, credit: Credit, eligible: Tensor, config: CreditConfig) -> dict[str, Tensor]:
    """What the credit did over the eligible tokens, and a warning if it did nothing though it was meant to."""
    d = stats.reverse_kl.reshape(-1)[eligible]
    w, s, spans = (x[eligible] for x in credit)
    no_divergence, no_weight = bool((d == 0).all()), bool((w == 1).all())
    inert = d.numel() > 0 and (no_divergence or no_weight)
    meant = config.rule == "none" or (config.rule in USE_GAMMA and config.gamma == 0)
    if inert and not meant:
        what = "all divergences are 0" if no_divergence else "all weights are 1"
        so = ", so this is plain GRPO" if no_weight else ""
        warnings.warn(f"credit is inert: {what} over {d.numel()} eligible tokens{so}", RuntimeWarning, stacklevel=4)
    in_spans = (spans >= 0).sum()
    count = torch.unique(spans[spans >= 0]).numel()
    return {
        "credit/mean_divergence": _mean(d),
        "credit/mean_weight": _mean(w) if w.numel() else torch.ones((), dtype=w.dtype, device=w.device),
        "credit/frac_salient": _mean((s > 0).float()),
        "credit/frac_saturated": _mean((w >= config.clip).float()),
        "credit/num_spans": torch.tensor(float(count), device=d.device),
        "credit/mean_span_length": in_spans / max(count, 1),
        "credit/teacher_entropy": _mean(stats.teacher_entropy.reshape(-1)[eligible]),
        "credit/inert": torch.tensor(float(inert), device=d.device),
    }


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)


def _runs(loss_tokens: Tensor) -> Tensor:  # [N]
    """A number for each run of loss tokens. Runs that touch across sequences may share one: those are cut anyway."""
    m = loss_tokens.reshape(-1)
    return (m & ~m.roll(1)).cumsum(0)


def _sequence_bounds(leading: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Credit is normalised and cut within a rollout, so packed tokens must say where one begins."""
    if cu_seqlens is not None:
        return cu_seqlens
    if len(leading) == 1:
        raise ValueError("cu_seqlens is None, needs [B + 1] for packed hidden [N, H]: credit stays within a sequence")
    return torch.arange(leading[0] + 1) * leading[1]
