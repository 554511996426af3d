"""What a model and a way of feeding it must not be, asked once, before the first step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sgcd_kernels.core.validation import check_dtype
from sgcd_kernels.logit_transform import check_unscaled

# transformers' names of layers that see earlier tokens through a running state, or a convolution, and not by attention.
_RECURRENT = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}


def check_model(model: nn.Module, *, packed: bool = False, group: ProcessGroup | None = None) -> None:
    """Refuse a Hugging Face style causal LM whose head these ops cannot take, or that cannot be fed as is said.

    Call it where a loss is made, so that what cannot work fails there and not after a thousand steps. `packed` says
    that several sequences will share a row of tokens, `group` that the head is sharded by vocabulary over these ranks.

    Raises ValueError, with the reason, for
    - a model without output embeddings, or a head that is quantised: its gradient is that of no number it stores,
      and the ops read bf16, fp16, fp32 or fp64;
    - an adapter on the head, which its weight alone does not hold, or logits that the model scales, which no op does;
    - `packed` with a recurrent model (Mamba, gated delta net, ...): its state flows from one sequence into the next;
    - `group` with tied embeddings: each rank would train its own rows of a matrix that the embedding needs whole.

    >>> class Tiny(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.lm_head = nn.Linear(8, 32, bias=False)
    ...     def get_output_embeddings(self):
    ...         return self.lm_head
    >>> check_model(Tiny(), packed=True)
    >>> check_model(nn.Linear(8, 32))
    Traceback (most recent call last):
    ValueError: model is a Linear, needs get_output_embeddings() to give its head
    """
    weight = _head_weight(model)
    _check_stored_plainly(weight)
    check_unscaled(model)
    states = _recurrent_layers(model)
    if packed and states:
        raise ValueError(
            f"packed is True, needs False for {type(model).__name__}: its {', '.join(states)} layers carry a state "
            "from one packed sequence into the next; give it one sequence a row, [B, T]"
        )
    if group is not None and _embedding_weight(model) is weight:
        raise ValueError(
            f"group is given, needs untied embeddings: {type(model).__name__} has one matrix for embedding and head, "
            "and a rank that holds some rows of it cannot embed the other words"
        )


def _head_weight(model: nn.Module) -> Tensor:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise ValueError(f"model is a {type(model).__name__}, needs get_output_embeddings() to give its head")
    if hasattr(head, "base_layer"):  # peft's name of what an adapter is put on, whatever its kind
        raise ValueError(
            "the head has an adapter on it, needs none: its weight is the frozen one alone; leave the head out of "
            "target_modules, or train it whole (modules_to_save)"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):  # PyTorch's own quantised layers have a method of that name
        raise ValueError(f"the head is a {type(head).__name__}, needs a plain weight tensor: keep the head unquantised")
    return weight


def _check_stored_plainly(weight: Tensor) -> None:
    """bitsandbytes, GPTQ and fp8 store odd dtypes; torchao's tensor classes claim a float one."""
    sharded = hasattr(weight, "placements")  # a DTensor, of plain tensors
    if type(weight) not in (Tensor, nn.Parameter) and not sharded:
        kind = type(weight).__name__
        raise ValueError(f"the head's weight is a {kind}, needs a plain tensor: keep the head unquantised")
    check_dtype("the head's weight", weight)


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
