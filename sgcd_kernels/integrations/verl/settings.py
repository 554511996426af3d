"""Checks that a verl config allows credit, before a model is loaded or a token generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf
from verl.trainer.ppo import core_algos
from verl.utils.import_utils import load_extern_object

from sgcd_kernels.integrations.verl.policy_loss import PREFIX, WITHOUT_TWIN

TRAINER = "sgcd_sync"  # trainer.v1.trainer_mode


def check_config(config: Any) -> None:
    """Raises ValueError, with the reason, for a run whose first update would fail, or would train without credit."""
    actor = config.actor_rollout_ref.actor
    mode = actor.policy_loss.loss_mode
    without = [f"{PREFIX}_{name}" for name in WITHOUT_TWIN]
    if mode in without:
        raise ValueError(
            f"loss_mode is {mode!r}, which averages the advantages of a sequence first: no token credit is left"
        )
    twins = sorted(name for name in core_algos.POLICY_LOSS_REGISTRY if name.startswith(PREFIX))
    if mode not in twins:
        raise ValueError(f"loss_mode is {mode!r}, which takes no token weights; needs one of {', '.join(twins)}")
    if actor.strategy != "fsdp2":
        raise ValueError(f"actor.strategy is {actor.strategy!r}, needs 'fsdp2': other engines compute no divergence")
    if not config.actor_rollout_ref.model.use_fused_kernels:
        raise ValueError("use_fused_kernels is False, needs True: only the fused head computes the divergence")


def reference_function(config: Any) -> Callable[..., Any]:
    """The function that `trainer.v1.sgcd_sync.reference_func: {path, name}` names, as verl's other custom functions.

    Raises ValueError if it names none, and as verl does if it cannot be loaded.
    """
    where = f"trainer.v1.{TRAINER}.reference_func"
    given = OmegaConf.select(config, where)
    if not (given and given.get("path") and given.get("name")):
        raise ValueError(f"{where} is {given}, needs path and name of a function, which writes the teacher's reference")
    function: Callable[..., Any] | object = load_extern_object(given.path, given.name)
    if not callable(function):
        raise ValueError(f"{where} names a {type(function).__name__}, needs a function of Siblings")
    return function
