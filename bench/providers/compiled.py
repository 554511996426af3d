"""The plain PyTorch functions under torch.compile, with its default settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.inputs import Inputs
from bench.providers import Outputs, eager, provides
from bench.truth import policy_loss


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def loss_of_rows(hidden: Any, weight: Any, ids: Any, old_logp: Any, advantages: Any) -> Any:
    return policy_loss(eager.target_logp(hidden, weight, ids), old_logp, advantages)


@provides("logprob", "compile", compiles=True)
def logprob(i: Inputs, mode: str) -> Outputs:
    return {"logp": compiled(eager.target_logp)(i.hidden[i.rows], i.weight, i.ids[i.rows])}


@provides("cross_entropy", "compile", compiles=True)
def cross_entropy(i: Inputs, mode: str) -> Outputs:
    return {"loss": compiled(eager.mean_nll)(i.hidden[i.rows], i.weight, i.ids[i.rows])}


@provides("divergence", "compile", compiles=True)
def divergence(i: Inputs, mode: str) -> Outputs:
    found = compiled(eager.kl_and_entropy)(i.hidden[i.rows], i.teacher[i.rows], i.weight)
    return dict(zip(("reverse_kl", "teacher_entropy"), found))


@provides("distill", "compile", compiles=True)
def distill(i: Inputs, mode: str) -> Outputs:
    return {"loss": compiled(eager.mean_jsd)(i.hidden[i.rows], i.teacher[i.rows], i.weight)}


@provides("policy_loss", "compile", compiles=True)
def policy(i: Inputs, mode: str) -> Outputs:
    rows = i.rows
    tensors = (i.hidden[rows], i.weight, i.ids[rows], i.old_logp[rows], i.token_advantages)
    return {"loss": compiled(loss_of_rows)(*tensors)}


@provides("sgcd", "compile", compiles=True)
def sgcd(i: Inputs, mode: str) -> Outputs:
    """Both halves compiled; the credit weights between them are a sequential scan, which is left to eager."""
    rows = i.rows
    student, teacher = i.hidden[rows], i.teacher[rows]
    with torch.no_grad():
        weights = eager.credit_of(i, *compiled(eager.kl_and_entropy)(student, teacher, i.weight))
    tensors = (student, i.weight, i.ids[rows], i.old_logp[rows], i.token_advantages * weights)
    return {"loss": compiled(loss_of_rows)(*tensors)}
