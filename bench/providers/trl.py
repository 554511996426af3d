"""TRL's chunked log-probs and divergences: library GEMMs on tiles, reduced by Triton on a GPU, by PyTorch elsewhere.

They are called as its trainers call them on a GPU: on the tokens that have a loss, with only the outputs needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.inputs import Inputs
from bench.providers import Outputs, needs, provides
from bench.providers.eager import credit_of
from bench.truth import BETA, policy_loss

PACKAGE = "trl"
VOCAB_CHUNK = 32_768  # trl.trainer.utils, 1.16
REVERSE_KL = 1.0  # what its beta calls KL(student || teacher)
refuses = needs("trl")


def target_logp(
    hidden: Tensor, weight: Tensor, ids: Tensor, outputs: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor | None]:
    """(log p(y), entropy if it is in `outputs`), [n] each."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    found = ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, VOCAB_CHUNK, None, 1.0, outputs)
    return found[0], found[1]


def divergence(i: Inputs, beta: float) -> Tensor:  # [n]
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    head = i.weight.detach()
    found: tuple[Tensor, Tensor] = ChunkedDivergenceFunction.apply(
        i.hidden[i.rows], i.weight, None, i.teacher[i.rows], head, None, beta
    )
    return found[0]


@torch.no_grad()
def score(i: Inputs) -> tuple[Tensor, Tensor]:
    """(KL(student || teacher), entropy of the teacher): its divergence gives the student's only, so two passes."""
    _, entropy = target_logp(i.teacher[i.rows], i.weight, i.ids[i.rows], ("entropy",))
    assert entropy is not None
    return divergence(i, REVERSE_KL), entropy


@provides("logprob", "trl", package=PACKAGE, refuses=refuses)
def logprob(i: Inputs, mode: str) -> Outputs:
    return {"logp": target_logp(i.hidden[i.rows], i.weight, i.ids[i.rows])[0]}


@provides("cross_entropy", "trl", package=PACKAGE, refuses=refuses)
def cross_entropy(i: Inputs, mode: str) -> Outputs:
    return {"loss": -target_logp(i.hidden[i.rows], i.weight, i.ids[i.rows])[0].mean()}


@provides("divergence", "trl", package=PACKAGE, refuses=refuses)
def both(i: Inputs, mode: str) -> Outputs:
    return dict(zip(("reverse_kl", "teacher_entropy"), score(i)))


@provides("distill", "trl", package=PACKAGE, refuses=refuses)
def distill(i: Inputs, mode: str) -> Outputs:
    return {"loss": divergence(i, BETA).mean()}


@provides("policy_loss", "trl", package=PACKAGE, refuses=refuses)
def policy(i: Inputs, mode: str) -> Outputs:
    logp, _ = target_logp(i.hidden[i.rows], i.weight, i.ids[i.rows])
    return {"loss": policy_loss(logp, i.old_logp[i.rows], i.token_advantages)}


@provides("sgcd", "trl", package=PACKAGE, refuses=refuses)
def sgcd(i: Inputs, mode: str) -> Outputs:
    """The whole step from TRL's pieces, with our credit weights between them."""
    weights = credit_of(i, *score(i))
    logp, _ = target_logp(i.hidden[i.rows], i.weight, i.ids[i.rows])
    return {"loss": policy_loss(logp, i.old_logp[i.rows], i.token_advantages * weights)}
