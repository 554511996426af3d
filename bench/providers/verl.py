"""verl's Triton kernel for log-probs and entropy (`verl.utils.kernel.linear_cross_entropy`)."""

from __future__ import annotations

from torch import Tensor

from bench.inputs import Inputs
from bench.providers import Outputs, needs, provides
from bench.truth import policy_loss

PACKAGE = "verl"
refuses = needs("verl", gpu=True)


def logp_and_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:  # [n] each
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    found: tuple[Tensor, Tensor] = linear_cross_entropy(hidden, weight, ids, 1.0, "none")
    return found


@provides("logprob", "verl", package=PACKAGE, refuses=refuses)
def logprob(i: Inputs, mode: str) -> Outputs:
    return {"logp": logp_and_entropy(i.hidden[i.rows], i.weight, i.ids[i.rows])[0]}


@provides("cross_entropy", "verl", package=PACKAGE, refuses=refuses)
def cross_entropy(i: Inputs, mode: str) -> Outputs:
    return {"loss": -logp_and_entropy(i.hidden[i.rows], i.weight, i.ids[i.rows])[0].mean()}


@provides("policy_loss", "verl", package=PACKAGE, refuses=refuses)
def policy(i: Inputs, mode: str) -> Outputs:
    logp, _ = logp_and_entropy(i.hidden[i.rows], i.weight, i.ids[i.rows])
    return {"loss": policy_loss(logp, i.old_logp[i.rows], i.token_advantages)}
