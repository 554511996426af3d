"""The specification of every op, in plain PyTorch: full logits, one line per formula, loops where they read best.

Every backend is tested against it in fp64 and has no code in common with it. It takes packed tokens only, holds N x V
logits, and checks nothing. Masks are bool; `cu_seqlens` is a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any, NamedTuple

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
    """(KL(p || q), KL(q || p)) over the K likeliest vocab ids of q, the observed token, and a bucket of all others."""
    reverse, forward = [], []
    for p_row, q_row, target in zip(p.softmax(-1), q.softmax(-1), targets, strict=True):
        ids = sorted({*q_row.topk(k).indices.tolist(), int(target)})
        rest = [v for v in range(len(p_row)) if v not in ids]
        a = torch.stack([*p_row[ids], p_row[rest].sum()])
        b = torch.stack([*q_row[ids], q_row[rest].sum()])
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
            ratio = torch.exp(log_ratio)
            if loss_type == "cispo":
                loss = -ratio.detach().clamp(max=1 + high) * advantages[t] * logp[t]
            else:
                clipped = ratio.clamp(1 - epsilon, 1 + high)
                loss = -min(ratio * advantages[t], clipped * advantages[t])
            if importance_weights is not None:
                loss = loss * importance_weights[t]
            if ref_logp is not None and beta:
                gap = ref_logp[t] - logp[t]
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


def sgcd_loss(
    p: Tensor,  # [N, V], the student's logits
    q: Tensor,  # [N, V], the teacher's
    targets: Tensor,  # [N]
    advantages: Tensor,  # [N] or [B]
    cu_seqlens: list[int],
    mask: Tensor,  # [N], the loss tokens
    *,
    config: CreditConfig,
    has_teacher: Tensor | None = None,  # [N] or [B]
    credit_mask: Tensor | None = None,  # [N]
    turn_ids: Tensor | None = None,  # [N]
    **policy: Any,
) -> Tensor:
    """The policy loss with advantages A W. Rows of q without a teacher may hold anything."""
    (logp, student_entropy, _), (teacher_logp, teacher_entropy, _) = logprob(p, targets), logprob(q, targets)
    advantages = per_token(advantages, cu_seqlens)
    eligible = mask.clone()
    if has_teacher is not None:
        eligible &= per_token(has_teacher, cu_seqlens)
    if credit_mask is not None:
        eligible &= credit_mask
    weights, _, _ = credit_weights(
        kl(p, q),
        teacher_entropy,
        cu_seqlens,
        mask=eligible,
        turn_ids=runs(mask) if turn_ids is None else turn_ids,
        advantages=advantages,
        log_ratio=teacher_logp - logp,
        forward_kl=kl(q, p),
        bhattacharyya=bhattacharyya(p, q),
        student_entropy=student_entropy,
        config=config,
    )
    return policy_loss(logp, advantages * weights, mask, cu_seqlens, **policy)


def per_token(values: Tensor, cu_seqlens: list[int]) -> Tensor:
    """One value per token, given values per token or per sequence."""
    if len(values) == cu_seqlens[-1]:
        return values
    return torch.cat([value.repeat(stop - start) for value, (start, stop) in zip(values, pairwise(cu_seqlens))])


def runs(mask: Tensor) -> Tensor:
    """The turns, if no `turn_ids` are given: a number for each run of consecutive loss tokens."""
    numbers, number, before = [], 0, False
    for loss_token in mask.tolist():
        number += loss_token and not before
        numbers.append(number)
        before = loss_token
    return torch.tensor(numbers)


class Eligible(NamedTuple):
    """The eligible tokens of one sequence, a list per signal; a rule reads some of them."""

    sequence: int  # its place in the batch
    divergence: list[float]  # d = KL(p || q)
    teacher_entropy: list[float]  # H_q
    turns: list[int]
    advantages: list[float]  # A
    log_ratio: list[float]  # D = log q(y) - log p(y)
    forward_kl: list[float]  # KL(q || p)
    bhattacharyya: list[float]
    student_entropy: list[float]  # H_p


Credit = tuple[list[float], list[float], list[int]]  # W, s, span ids


def credit_weights(
    divergence: Tensor,  # [N], as all tensors
    teacher_entropy: Tensor,
    cu_seqlens: list[int],
    *,
    config: CreditConfig,
    mask: Tensor | None = None,
    turn_ids: Tensor | None = None,
    advantages: Tensor | None = None,
    log_ratio: Tensor | None = None,
    forward_kl: Tensor | None = None,
    bhattacharyya: Tensor | None = None,
    student_entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(W, s, span ids), sequence by sequence. W is 1, s is 0 and the span -1 at tokens outside `mask`."""
    n = len(divergence)
    weights, saliency, spans = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64), [-1] * n
    signals = divergence, teacher_entropy, turn_ids, advantages, log_ratio, forward_kl, bhattacharyya, student_entropy
    for sequence, (start, stop) in enumerate(pairwise(cu_seqlens)):
        at = [t for t in range(start, stop) if mask is None or mask[t]]
        if not at:
            continue
        lists = ([0] * len(at) if x is None else x[at].tolist() for x in signals)
        credit = RULES[config.rule](Eligible(sequence, *lists), config)  # type: ignore[arg-type]
        first = max(spans) + 1  # spans are counted through the batch
        for t, w, s, span in zip(at, *credit, strict=True):
            weights[t], saliency[t], spans[t] = w, s, span + first if span >= 0 else -1
    return weights, saliency, torch.tensor(spans)


def sgcd_credit(divergence: list[float], teacher_entropy: list[float], turns: list[int], cfg: CreditConfig) -> Credit:
    """The eligible tokens of one sequence."""
    u = normalised(divergence, cfg)
    onsets = find_onsets(u, teacher_entropy, turns, cfg)
    saliency = [0.0 if onset is None else span_value(u, t, onset, cfg) for t, onset in enumerate(onsets)]
    return [min(max(1 + cfg.gamma * s, 1.0), cfg.clip) for s in saliency], saliency, numbered(onsets)


def normalised(d: list[float], cfg: CreditConfig) -> list[float]:
    scale = max(quantile(d, cfg.quantile), cfg.d_floor)
    return [min(max(x / scale, 0.0), 1.0) for x in d]


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def find_onsets(u: list[float], entropy: list[float], turns: list[int], cfg: CreditConfig) -> list[int | None]:
    """The onset of each token's span, found by one scan from left to right."""
    onsets: list[int | None] = []
    onset: int | None = None
    quiet = 0
    for t in range(len(u)):
        quiet = quiet + 1 if u[t] < cfg.reset else 0
        if onset is not None:
            h = entropy[onset]
            risen = entropy[t] > max(cfg.entropy_ratio * h, h + cfg.entropy_margin)
            if risen or quiet >= cfg.patience or turns[t] != turns[onset]:
                onset = None
        if onset is None and u[t] > cfg.start:
            onset, quiet = t, 0
        onsets.append(onset)
    return onsets


def span_value(u: list[float], t: int, onset: int, cfg: CreditConfig) -> float:
    return u[onset] if cfg.span_value == "onset" else u[t]


def numbered(onsets: list[int | None]) -> list[int]:
    """Spans by number, -1 outside."""
    spans = sorted({onset for onset in onsets if onset is not None})
    return [-1 if onset is None else spans.index(onset) for onset in onsets]


def sgcd(x: Eligible, cfg: CreditConfig) -> Credit:
    return sgcd_credit(x.divergence, x.teacher_entropy, x.turns, cfg)


def none(x: Eligible, cfg: CreditConfig) -> Credit:
    return plain([1.0 for _ in x.divergence])


def uniform(x: Eligible, cfg: CreditConfig) -> Credit:
    return plain([min(1 + cfg.gamma, cfg.clip) for _ in x.divergence], saliency=1.0)


def matched_uniform(x: Eligible, cfg: CreditConfig) -> Credit:
    weights, saliency, _ = sgcd(x, cfg)
    return plain([fmean(weights) for _ in weights], fmean(saliency))


def permuted(x: Eligible, cfg: CreditConfig) -> Credit:
    """The order depends only on the seed, the sequence's place in the batch and its number of eligible tokens."""
    order = shuffled(len(x.divergence), x.sequence, cfg.seed)
    weights, saliency, spans = sgcd(x, cfg)
    return [weights[i] for i in order], [saliency[i] for i in order], [spans[i] for i in order]


def shuffled(count: int, sequence: int, seed: int) -> list[int]:
    """The places of SplitMix64's numbers (Steele, Lea, Flood, OOPSLA 2014) in rising order, as signed integers."""
    step = 0x9E3779B97F4A7C15
    start = mixed(seed % 2**63 * step + sequence)
    draws = [mixed(start + i * step) for i in range(count)]
    return sorted(range(count), key=lambda i: (draws[i] + 2**63) % 2**64)


def mixed(x: int) -> int:
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def gear(x: Eligible, cfg: CreditConfig) -> Credit:
    own = normalised([-delta for delta in x.log_ratio], cfg)
    onsets = find_onsets(own, x.teacher_entropy, x.turns, cfg)
    r = [own[t] if onset is None else span_value(own, t, onset, cfg) for t, onset in enumerate(onsets)]
    w = [0.5 + (0.5 - value) * sign(a) for value, a in zip(r, x.advantages)]
    return [cfg.gear_alpha * value + 1 - cfg.gear_alpha / 2 for value in w], r, numbered(onsets)


def rlsd(x: Eligible, cfg: CreditConfig) -> Credit:
    return plain([1 - cfg.rlsd_lambda + cfg.rlsd_lambda * ratio for ratio in signed_ratios(x, cfg.rlsd_epsilon)])


def sc_grpo(x: Eligible, cfg: CreditConfig) -> Credit:
    c = max(quantile(x.forward_kl, cfg.sc_grpo_quantile), cfg.sc_grpo_floor)
    return plain([k / (k + c) for k in x.forward_kl])


def egrsd(x: Eligible, cfg: CreditConfig) -> Credit:
    certainty = [min(max(1 - cfg.egrsd_gamma * h, cfg.egrsd_floor), 1.0) for h in relative(x.teacher_entropy)]
    return plain([ratio * c for ratio, c in zip(signed_ratios(x, cfg.egrsd_epsilon), certainty)])


def dgpo(x: Eligible, cfg: CreditConfig) -> Credit:
    hellinger = [math.sqrt(max(1 - b, 0.0)) for b in x.bhattacharyya]
    score = [d * h**cfg.dgpo_kappa / cfg.dgpo_tau for d, h in zip(hellinger, relative(x.student_entropy))]
    return plain([len(score) * w for w in torch.tensor(score, dtype=torch.float64).softmax(0).tolist()])


def turn_level(x: Eligible, cfg: CreditConfig) -> Credit:
    """A turn is all tokens with the same id, contiguous or not; each turn counts once."""
    means = {i: fmean(d for d, turn in zip(x.log_ratio, x.turns) if turn == i) for i in set(x.turns)}
    centre, deviation = fmean(means.values()), max(pstdev(means.values()), 1e-6)
    z = [(means[turn] - centre) / deviation for turn in x.turns]
    return plain([1 + cfg.turn_epsilon * math.tanh(sign(a) * value) for a, value in zip(x.advantages, z)])


def plain(weights: list[float], saliency: float = 0.0) -> Credit:
    """One saliency for all tokens, and no spans."""
    return weights, [saliency for _ in weights], [-1 for _ in weights]


def signed_ratios(x: Eligible, epsilon: float) -> list[float]:
    """clip(exp(sign(A) D), 1 - epsilon, 1 + epsilon)"""
    ratios = (math.exp(min(sign(a) * delta, 20.0)) for a, delta in zip(x.advantages, x.log_ratio))
    return [min(max(ratio, 1 - epsilon), 1 + epsilon) for ratio in ratios]


def relative(entropy: list[float]) -> list[float]:
    largest = max(*entropy, 1e-6)
    return [h / largest for h in entropy]


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


RULES: dict[str, Callable[[Eligible, CreditConfig], Credit]] = {
    "sgcd": sgcd,
    "none": none,
    "uniform": uniform,
    "matched_uniform": matched_uniform,
    "permuted": permuted,
    "gear": gear,
    "rlsd": rlsd,
    "sc_grpo": sc_grpo,
    "egrsd": egrsd,
    "dgpo": dgpo,
    "turn_level": turn_level,
}
