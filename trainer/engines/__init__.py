"""Engines give token ids that they sample from the policy. Each is imported only when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.protocols import Engine, Renderer

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.engines.hf import HFEngine
    from trainer.engines.padded import PaddedEngine


def make(config: Config, model: Any, renderer: Renderer) -> Engine:
    """The engine that samples from `model`: `hf` where a plain cache of keys and values is all the state there is."""
    if config.engine.name == "vllm":
        from trainer.engines import vllm_launch

        return vllm_launch.engine(config, model, renderer)
    from trainer.engines.hf import HFEngine
    from trainer.engines.padded import PaddedEngine
    from trainer.learning.model import layer_kinds

    slots, length = config.engine.slots, config.model.max_length
    plain = layer_kinds(model) == {"full_attention"} and config.model.attn_implementation in ("sdpa", "eager")
    made: type[HFEngine] | type[PaddedEngine] = HFEngine if plain else PaddedEngine
    try:
        return made(model, slots=slots, stop_ids=renderer.stop_ids, max_length=length, seed=config.seed)
    except ValueError as error:
        raise UserError(f"model.path: {config.model.path} cannot be sampled from ({error}); choose another") from error
