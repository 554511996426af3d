"""Hugging Face causal LMs: how they transform logits after the head, and which of them these ops support.

transformers has neither a hook nor a common name for a scale or a softcap of logits: each model's forward reads fields
of its config. These are the fields of every causal LM of transformers 5.23 (test_models.py runs the models).
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sgcd_kernels.core.validation import check_dtype

_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISOR = "logits_scaling"  # but for _MULTIPLIES
_MULTIPLIES = "hyperclovax"
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Other names for a scale or cap of the output, in models from outside transformers.
_SUSPECT = re.compile(r"(?!.*(attn|attention|router)).*(logit|lm_head|output).*(scal|mult|cap)")


class LogitTransform(NamedTuple):
    """logits = cap(scale * (hidden weight^T + bias)), where cap(z) = softcap * tanh(z / softcap)."""

    scale: float
    softcap: float | None


def logit_transform(model: nn.Module) -> LogitTransform:
    """Read the scale and softcap of a causal LM from its config (its text config, if it has several).

    (1, None) without a config. Raises ValueError for a field that looks like a scale or a cap of the logits and is not
    known here, and for a head with more rows than the model has vocab ids.

    >>> logit_transform(nn.Linear(8, 32))
    LogitTransform(scale=1, softcap=None)
    """
    config = _text_config(model)
    _check_all_read(type(model).__name__, config)
    scale = math.prod(_numbers(config, *_FACTORS))
    for divisor in _numbers(config, _DIVISOR):
        scale *= divisor if config.model_type == _MULTIPLIES else 1 / divisor
    return LogitTransform(scale, next(iter(_numbers(config, *_CAPS)), None))


def check_unscaled(model: nn.Module) -> None:
    """Refuse a model that scales its logits, which no op does.

    Raises ValueError as `logit_transform` does, and for a scale other than 1.
    """
    scale = logit_transform(model).scale
    if scale != 1.0:
        raise ValueError(
            f"{type(model).__name__} multiplies its logits by {scale:g}, needs 1: the ops know a softcap, but no scale"
        )


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _numbers(config: Any, *names: str) -> list[float]:
    values = (getattr(config, name, None) for name in names)
    return [float(value) for value in values if value is not None]


def _check_all_read(kind: str, config: Any) -> None:
    fields = vars(config) if config is not None else {}
    for name, value in fields.items():
        unread = name not in (*_FACTORS, _DIVISOR, *_CAPS) and _SUSPECT.match(name)
        if unread and type(value) in (int, float) and value not in (0, 1):
            raise ValueError(f"{name} of {kind} is {value}, needs 1: how it changes the logits is not known here")
    if fields.get("model_type") == "mpt" and fields.get("logit_scale") is not None:
        # MPT's own code scales, transformers' does not, and both read this config.
        raise ValueError(f"logit_scale of {kind} is {fields['logit_scale']!r}, needs None")
    vocab = fields.get("unpadded_vocab_size")
    if vocab is not None and vocab < config.vocab_size:
        raise ValueError(f"the head of {kind} has {config.vocab_size} rows for {vocab} vocab ids, needs one row per id")


# transformers' names of layers that see earlier tokens through a recurrent state or a convolution instead of attention.
_RECURRENT = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}


def check_model(model: nn.Module, *, packed: bool = False, group: ProcessGroup | None = None) -> None:
    """Refuse a Hugging Face style causal LM whose head these ops cannot use, or that cannot be fed as described.

    Call it at set-up, so that it fails there and not in the middle of training. `packed`: several sequences are
    concatenated in one row of tokens. `group`: the head is sharded by vocabulary over these ranks.

    Raises ValueError, with the reason, for
    - a model without output embeddings, or with a quantised head: the ops read bf16, fp16, fp32 or fp64;
    - an adapter on the head, which the head's weight does not contain, or logits that the model scales;
    - `packed` with a recurrent model (Mamba, gated delta net, ...): its state leaks from one sequence into the next;
    - `group` with tied embeddings: each rank would train only some rows of a matrix that the embedding needs whole.

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
            "and a rank that holds some rows of it cannot embed the other vocab ids"
        )


def _head_weight(model: nn.Module) -> Tensor:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise ValueError(f"model is a {type(model).__name__}, needs get_output_embeddings() to give its head")
    if hasattr(head, "base_layer"):  # peft's name for the wrapped layer, for adapters of all kinds
        raise ValueError(
            "the head has an adapter on it, needs none: its own weight is only the frozen part; leave the head out of "
            "target_modules, or train it whole (modules_to_save)"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):  # PyTorch's own quantised layers have a method of that name
        raise ValueError(f"the head is a {type(head).__name__}, needs a plain weight tensor: keep the head unquantised")
    return weight


def _check_stored_plainly(weight: Tensor) -> None:
    """Refuse quantised weights: bitsandbytes, GPTQ and fp8 by dtype, torchao, which reports a float one, by class."""
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
