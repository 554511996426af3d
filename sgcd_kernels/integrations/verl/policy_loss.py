"""verl's own policy losses on advantages A W: `loss_mode: sgcd` is its "vanilla", `sgcd_gspo` its "gspo", and so on.

verl calls a policy loss with five tensors and no room for a sixth, so the engine passes W in a context variable. A loss
that finds none raises: a run configured for sgcd never silently trains without credit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor
from verl.trainer.ppo import core_algos

PREFIX = "sgcd"
BASE = "vanilla"  # the loss that "sgcd" weights
# It first averages the advantages of a sequence, so that no token would keep its weight.
WITHOUT_TWIN = ("geo_mean",)


class TokenWeights(NamedTuple):
    """The weights of one micro-batch's advantages, and the metrics to log."""

    weights: Tensor  # W [B, R]
    metrics: dict[str, float]


_CURRENT: ContextVar[TokenWeights | None] = ContextVar("sgcd_token_weights", default=None)


@contextmanager
def token_weights(given: TokenWeights) -> Iterator[None]:
    """Inside, the policy losses registered by `register_policy_losses` weight their advantages by these."""
    token = _CURRENT.set(given)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def weighted(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A policy loss of verl on A W. If every W is 1 the result has the same bits."""

    @wraps(loss)
    def on_weighted_advantages(
        old_log_prob: Tensor,  # [B, R]
        log_prob: Tensor,  # [B, R]
        advantages: Tensor,  # [B, R]
        response_mask: Tensor,  # [B, R]
        *others: Any,
        **named: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        given = _CURRENT.get()
        if given is None:
            raise ValueError(
                "this micro-batch has no token weights, needs our engine (strategy fsdp2, external_lib "
                "sgcd_kernels.integrations.verl.register) and teacher_input_ids in the batch (trainer_mode sgcd_sync)"
            )
        if given.weights.shape != advantages.shape:
            got, needs = list(given.weights.shape), list(advantages.shape)
            raise ValueError(f"the token weights have shape {got}, need {needs} as the advantages")
        loss_value, metrics = loss(
            old_log_prob, log_prob, advantages * given.weights.to(advantages.dtype), response_mask, *others, **named
        )
        return loss_value, metrics | given.metrics

    return on_weighted_advantages


def register_policy_losses() -> list[str]:
    """Register a weighted version of each policy loss of verl that supports token weights; return the names."""
    made = []
    for mode, loss in list(core_algos.POLICY_LOSS_REGISTRY.items()):
        if not mode.startswith(PREFIX) and mode not in WITHOUT_TWIN:
            name = PREFIX if mode == BASE else f"{PREFIX}_{mode}"
            core_algos.register_policy_loss(name)(weighted(loss))
            made.append(name)
    return made
