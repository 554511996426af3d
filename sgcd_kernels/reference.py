"""What every op means, in the plainest PyTorch: full logits, one line a formula, loops where they read best.

This is the specification. Every backend is tested against it in fp64, and nothing here is shared with one.
It works on packed rows only, holds N x V logits, and checks nothing. Masks are bool.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from sgcd_kernels.credit.config import CreditConfig


def logits(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or [N]
    softcap: float | None = None,
) -> Tensor:  # [N, V]
    """The final logits: softcap first, then temperature."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def logprob(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [N, V], [N] -> three [N]
    """(log p(y), entropy, lse)"""
    log_p = torch.log_softmax(z, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -times(log_p.exp(), log_p).sum(-1), torch.logsumexp(z, -1)


def kl(p: Tensor, q: Tensor) -> Tensor:  # [N, V] logits -> [N]
    """KL(p || q)"""
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    return times(log_p.exp(), log_p - log_q).sum(-1)


def times(p: Tensor, x: Tensor) -> Tensor:
    """p x, with 0 ln 0 = 0."""
    return torch.where(p == 0, 0.0, p * x)


def bhattacharyya(p: Tensor, q: Tensor) -> Tensor:
    return (torch.log_softmax(p, -1) / 2 + torch.log_softmax(q, -1) / 2).exp().sum(-1)


def tv(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(-1) - q.softmax(-1)).abs().sum(-1) / 2


def jsd(p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p"""
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def topk_kl(p: Tensor, q: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(KL(p || q), KL(q || p)) over the K likeliest words of q, the observed token, and a bucket with all the rest."""
    reverse, forward = [], []
    for p_row, q_row, target in zip(p.softmax(-1), q.softmax(-1), targets, strict=True):
        words = sorted({*q_row.topk(k).indices.tolist(), int(target)})
        rest = [v for v in range(len(p_row)) if v not in words]
        a = torch.stack([*p_row[words], p_row[rest].sum()])
        b = torch.stack([*q_row[words], q_row[rest].sum()])
        reverse.append(times(a, (a / b).log()).sum())
        forward.append(times(b, (b / a).log()).sum())
    return torch.stack(reverse), torch.stack(forward)


def policy_loss(
    logp: Tensor,  # [N]
    advantages: Tensor,  # [N]
    mask: Tensor,  # [N]
    cu_seqlens: list[int],
    *,
    loss_type: str,
    old_logp: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_logp: Tensor | None = None,
    importance_weights: Tensor | None = None,
    num_items_in_batch: float | None = None,
) -> Tensor:
    """The GRPO family, sequence by sequence and token by token."""
    high = epsilon if epsilon_high is None else epsilon_high
    old = logp.detach() if old_logp is None else old_logp
    bounds = list(pairwise(cu_seqlens))
    sums, counts = [], []
    for start, stop in bounds:
        tokens = [t for t in range(start, stop) if mask[t]]
        total = logp.new_zeros(())
        for t in tokens:
            if loss_type == "gspo":
                mean = torch.stack([(logp[i] - old[i]).detach() for i in tokens]).mean()
                log_ratio = mean + logp[t] - logp[t].detach()
            else:
                log_ratio = logp[t] - old[t]
            ratio = torch.exp(log_ratio.clamp(max=20))
            if loss_type == "cispo":
                loss = -min(ratio.detach(), torch.tensor(1 + high)) * advantages[t] * logp[t]
            else:
                clipped = ratio.clamp(1 - epsilon, 1 + high)
                loss = -min(ratio * advantages[t], clipped * advantages[t])
            if importance_weights is not None:
                loss = loss * importance_weights[t]
            if ref_logp is not None and beta:
                gap = (ref_logp[t] - logp[t]).clamp(max=20)
                loss = loss + beta * (torch.exp(gap) - gap - 1)
            total = total + loss
        sums.append(total)
        counts.append(len(tokens))
    if loss_type in ("grpo", "gspo"):
        total = torch.stack([s / max(c, 1) for s, c in zip(sums, counts, strict=True)]).sum()
        items = float(len(bounds))
    else:
        total = torch.stack(sums).sum()
        longest = max(stop - start for start, stop in bounds)
        items = float(len(bounds) * longest if loss_type == "dr_grpo" else max(sum(counts), 1))
    return total / (items if num_items_in_batch is None else num_items_in_batch)


def sgcd_credit(
    divergence: list[float],
    teacher_entropy: list[float],
    turns: list[int],
    cfg: CreditConfig,
) -> tuple[list[float], list[float], list[int]]:
    """(W, s, span ids) of the eligible tokens of one sequence, read from left to right with the state of one span."""
    scale = max(float(torch.tensor(divergence, dtype=torch.float64).quantile(cfg.quantile)), cfg.d_floor)
    saliency, ids = [], []
    onset: int | None = None
    quiet, spans = 0, 0
    for t, d in enumerate(divergence):
        u = min(max(d / scale, 0.0), 1.0)
        quiet = quiet + 1 if u < cfg.reset else 0
        if onset is not None:
            h = teacher_entropy[onset]
            risen = teacher_entropy[t] > max(cfg.entropy_ratio * h, h + cfg.entropy_margin)
            if risen or quiet >= cfg.patience or turns[t] != turns[onset]:
                onset = None
        if onset is None and u > cfg.start:
            onset, onset_u, quiet, spans = t, u, 0, spans + 1
        inside = onset is not None
        saliency.append((onset_u if cfg.span_value == "onset" else u) if inside else 0.0)
        ids.append(spans - 1 if inside else -1)
    weights = [min(max(1 + cfg.gamma * s, 1.0), cfg.clip) for s in saliency]
    return weights, saliency, ids
