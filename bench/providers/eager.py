"""Plain PyTorch: the matrix of logits of the tokens that have a loss. The version that one writes first."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inputs import Inputs
from bench.providers import Outputs, provides
from bench.truth import BETA, CREDIT, credit, policy_loss
from sgcd_kernels import reference


def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:  # [n, V] fp32
    return F.log_softmax((hidden @ weight.T).float(), -1)


def target_logp(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:  # [n]
    return log_probs(hidden, weight).gather(1, ids[:, None])[:, 0]


def mean_nll(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), ids)


def kl_and_entropy(hidden: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # [n] each
    """(KL(student || teacher), entropy of the teacher): all that credit reads."""
    log_p, log_q = log_probs(hidden, weight), log_probs(teacher, weight)
    return (log_p.exp() * (log_p - log_q)).sum(-1), -(log_q.exp() * log_q).sum(-1)


def every_statistic(hidden: Tensor, teacher: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """The nine that `linear_divergence` gives."""
    log_p, log_q = log_probs(hidden, weight), log_probs(teacher, weight)
    p, q, at = log_p.exp(), log_q.exp(), ids[:, None]
    return (
        (p * (log_p - log_q)).sum(-1),
        -(q * log_q).sum(-1),
        (q * (log_q - log_p)).sum(-1),
        (log_p / 2 + log_q / 2).exp().sum(-1),
        log_p.gather(1, at)[:, 0],
        log_q.gather(1, at)[:, 0],
        -(p * log_p).sum(-1),
        *(torch.logsumexp((x @ weight.T).float(), -1) for x in (hidden, teacher)),
    )


def mean_jsd(hidden: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    log_p = log_probs(hidden, weight)
    with torch.no_grad():
        log_q = log_probs(teacher, weight)
    log_m = torch.logaddexp(log_p + torch.tensor(1 - BETA).log(), log_q + torch.tensor(BETA).log())
    of_p, of_q = (log_p.exp() * (log_p - log_m)).sum(-1), (log_q.exp() * (log_q - log_m)).sum(-1)
    return ((1 - BETA) * of_p + BETA * of_q).mean()


def spread(i: Inputs, values: Tensor) -> Tensor:  # [n] -> [N]
    return torch.zeros(i.mask.shape, dtype=values.dtype, device=values.device).index_copy(0, i.rows, values)


def credit_of(i: Inputs, divergence: Tensor, teacher_entropy: Tensor) -> Tensor:  # [n] each -> [n]
    return credit(i, spread(i, divergence), spread(i, teacher_entropy))[i.rows]


@provides("logprob", "eager")
def logprob(i: Inputs, mode: str) -> Outputs:
    return {"logp": target_logp(i.hidden[i.rows], i.weight, i.ids[i.rows])}


@provides("cross_entropy", "eager")
def cross_entropy(i: Inputs, mode: str) -> Outputs:
    return {"loss": mean_nll(i.hidden[i.rows], i.weight, i.ids[i.rows])}


@provides("divergence", "eager")
def divergence(i: Inputs, mode: str) -> Outputs:
    return dict(zip(("reverse_kl", "teacher_entropy"), kl_and_entropy(i.hidden[i.rows], i.teacher[i.rows], i.weight)))


@provides("divergence", "eager-all")
def all_statistics(i: Inputs, mode: str) -> Outputs:
    found = every_statistic(i.hidden[i.rows], i.teacher[i.rows], i.weight, i.ids[i.rows])
    return dict(zip(("reverse_kl", "teacher_entropy"), found))


@provides("distill", "eager")
def distill(i: Inputs, mode: str) -> Outputs:
    return {"loss": mean_jsd(i.hidden[i.rows], i.teacher[i.rows], i.weight)}


@provides("policy_loss", "eager")
def policy(i: Inputs, mode: str) -> Outputs:
    logp = target_logp(i.hidden[i.rows], i.weight, i.ids[i.rows])
    return {"loss": policy_loss(logp, i.old_logp[i.rows], i.token_advantages)}


@provides("credit", "reference", package="sgcd-kernels")
def naive_credit(i: Inputs, mode: str) -> Outputs:
    """The specification: a loop over the tokens in Python."""
    weights = torch.ones(i.mask.shape)
    columns = (i.divergence, i.teacher_entropy, i.turns)
    for start, stop in pairwise(i.cu_seqlens.tolist()):
        at = start + i.mask[start:stop].nonzero().squeeze(1)
        divergence, entropy, turns = (x[at].tolist() for x in columns)
        weights[at.cpu()] = torch.tensor(reference.sgcd_credit(divergence, entropy, turns, CREDIT)[0])
    return {"weights": weights.to(i.hidden.device)}


@provides("sgcd", "eager")
def sgcd(i: Inputs, mode: str) -> Outputs:
    student, teacher, ids = i.hidden[i.rows], i.teacher[i.rows], i.ids[i.rows]
    with torch.no_grad():
        weights = credit_of(i, *kl_and_entropy(student, teacher, i.weight))
    logp = target_logp(student, i.weight, ids)
    return {"loss": policy_loss(logp, i.old_logp[i.rows], i.token_advantages * weights)}
