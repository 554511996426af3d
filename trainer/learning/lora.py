"""Low-rank adapters through peft: the base stays as it was loaded, and is written nowhere.

The adapters live inside transformers' own module (its `add_adapter`), so engine, teacher and learner still share one
model: the teacher reads through the same adapters as the student. They are never merged while a run lasts. A
checkpoint holds the adapters alone; resuming puts them into a base that was loaded afresh from model.path, so there is
nothing that could be merged twice. The head is not adapted: the kernels read its weight, which gets no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.errors import UserError
from trainer.optional_packages import need

if TYPE_CHECKING:
    from trainer.config import LoraConfig


def add(model: Any, config: LoraConfig) -> None:
    """Freeze `model` and put adapters of `config` beside its linear layers; at first they change nothing.

    Raises:
        UserError: peft is not installed, or a target does not exist or is the head.
    """
    peft = need("peft")
    targets = config.target_modules
    try:
        model.add_adapter(
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=config.rank,
                lora_alpha=config.alpha,
                target_modules=targets if isinstance(targets, str) else list(targets),
            )
        )
    except ValueError as error:
        raise UserError(f"model.lora.target_modules: {' '.join(str(error).split())[:300]}") from error
    outside = (model.get_output_embeddings(), model.get_input_embeddings())
    if any(hasattr(layer, "lora_A") or hasattr(layer, "lora_embedding_A") for layer in outside):
        raise UserError(
            "model.lora.target_modules: head and embeddings cannot be adapted; use all-linear, or name other layers"
        )


def adapted(model: Any) -> bool:
    """Whether `model` has adapters, and so only they are trained and saved."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """The adapters' tensors, live, under the names that peft gives them in adapter_model.safetensors."""
    return {
        f"base_model.model.{name.replace('.default.', '.')}": tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }
