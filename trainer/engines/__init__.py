"""Engines sample token ids from the policy, by name or import path. Each is imported only when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer import plugins
from trainer.engines.contract import CheckedEngine
from trainer.errors import UserError
from trainer.protocols import Engine, Renderer

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.engines.hf import HFEngine
    from trainer.engines.padded import PaddedEngine


def make(config: Config, model: Any, renderer: Renderer) -> Engine:
    """The engine that samples from `model`; for `hf`, `padded` if layers keep more state than a key-value cache."""
    if config.engine.name == "vllm":
        from trainer.engines import vllm_launch

        return vllm_launch.engine(config, model, renderer)
    if config.engine.name != "hf":
        thing = plugins.find("engine.name", config.engine.name, plugins.ENGINES)
        offered = {"config": config, "model": model, "renderer": renderer}
        made = plugins.build("engine.name", config.engine.name, thing, config.engine.options, **offered)
        return CheckedEngine(config.engine.name, made)
    from trainer.engines.hf import HFEngine
    from trainer.engines.padded import PaddedEngine
    from trainer.learning.model import layer_kinds

    slots, length = config.engine.slots, config.model.max_length
    plain = layer_kinds(model) == {"full_attention"} and config.model.attn_implementation in ("sdpa", "eager")
    kind: type[HFEngine] | type[PaddedEngine] = HFEngine if plain else PaddedEngine
    try:
        return kind(model, slots=slots, stop_ids=renderer.stop_ids, max_length=length, seed=config.seed)
    except ValueError as error:
        raise UserError(f"model.path: {config.model.path} cannot be sampled from ({error}); choose another") from error
