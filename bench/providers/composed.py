"""The whole credit step from the best pieces of other libraries. None has it whole, or the weights: those are ours."""

from __future__ import annotations

from bench.cases import Case
from bench.inputs import Inputs
from bench.providers import Outputs, liger, provides, trl, verl
from bench.providers.eager import credit_of, spread
from bench.truth import policy_loss


def refuses_trl_liger(case: Case) -> str | None:
    return trl.refuses(case) or liger.anywhere(case)


def refuses_trl_verl(case: Case) -> str | None:
    return trl.refuses(case) or verl.refuses(case)


@provides("sgcd", "trl+liger", package="liger-kernel", refuses=refuses_trl_liger, compiles=True)
def trl_liger(i: Inputs, mode: str) -> Outputs:
    """TRL's divergence, Liger's GRPO loss."""
    return {"loss": liger.grpo(i, spread(i, credit_of(i, *trl.score(i))))}


@provides("sgcd", "trl+verl", package="verl", refuses=refuses_trl_verl)
def trl_verl(i: Inputs, mode: str) -> Outputs:
    """TRL's divergence, verl's log-probs."""
    weights = credit_of(i, *trl.score(i))
    logp, _ = verl.logp_and_entropy(i.hidden[i.rows], i.weight, i.ids[i.rows])
    return {"loss": policy_loss(logp, i.old_logp[i.rows], i.token_advantages * weights)}
