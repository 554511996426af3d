"""Which Hugging Face causal LMs these ops can be used with, and how they may be fed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from sgcd_kernels.measured_head import head_layer, output_head

# transformers' names of layers that see earlier tokens through a recurrent state or a convolution instead of attention.
_RECURRENT = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}


def check_model(model: nn.Module, *, packed: bool = False, group: ProcessGroup | None = None) -> None:
    """Refuse a Hugging Face style causal LM whose head these ops cannot use, or that cannot be fed as described.

    Call it at set-up, so that it fails there and not in the middle of training. `packed`: several sequences are
    concatenated in one row of tokens. `group`: the head is sharded by vocabulary over these ranks.

    Raises ValueError, with the reason, for
    - whatever `output_head` refuses: a head that is quantised or has an adapter, layers between decoder and head, ...;
    - `packed` with a recurrent model (Mamba, gated delta net, ...): its state leaks from one sequence into the next;
    - `group` with tied embeddings: each rank would train only some rows of a matrix that the embedding needs whole.

    >>> check_model(nn.Linear(8, 32))
    Traceback (most recent call last):
    ValueError: model is a Linear, needs get_output_embeddings() to give its head
    """
    weight = head_layer(model).weight
    states = _recurrent_layers(model)
    if packed and states:
        raise ValueError(
            f"packed is True, needs False for {type(model).__name__}: its {', '.join(states)} layers carry a state "
            "from one packed sequence into the next; give it one sequence a row, [B, T]"
        )
    if group is not None and _embedding_weight(model) is weight:
        raise ValueError(
            f"group is given, needs untied embeddings: {type(model).__name__} has one matrix for embedding and head, "
            "and a rank that holds some rows of it cannot embed the other vocab ids"
        )
    output_head(model)


def _embedding_weight(model: nn.Module) -> object:
    find = getattr(model, "get_input_embeddings", None)
    return getattr(find(), "weight", None) if callable(find) else None


def _recurrent_layers(model: nn.Module) -> list[str]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = sorted(_RECURRENT.intersection(getattr(text, "layer_types", None) or ()))
    if not kinds and getattr(model, "_is_stateful", False):
        kinds = [str(getattr(text, "model_type", "recurrent"))]
    return kinds
