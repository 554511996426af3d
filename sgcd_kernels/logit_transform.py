"""What a Hugging Face causal LM does to its logits behind the head: a scale, then a softcap.

transformers has neither a hook nor one name for it: each model's forward reads fields of its own config. These are the
fields of every causal LM of transformers 5.23 (tests/integrations/test_logit_transform.py runs the models).
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from torch import nn

_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISOR = "logits_scaling"  # but for _MULTIPLIES
_MULTIPLIES = "hyperclovax"
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Other names that speak of a scale or cap of the output, as models of other origin have them.
_SUSPECT = re.compile(r"(?!.*(attn|attention|router)).*(logit|lm_head|output).*(scal|mult|cap)")


class LogitTransform(NamedTuple):
    """logits = cap(scale * (hidden weight^T + bias)), where cap(z) = softcap * tanh(z / softcap)."""

    scale: float
    softcap: float | None


def logit_transform(model: nn.Module) -> LogitTransform:
    """Of a causal LM, by its config (the text's, where it has several); (1, None) without a config.

    Raises ValueError for a field that looks like a scale or a cap of the logits and is not known here, and for a head
    with more rows than the model has words.
    """
    config = _text_config(model)
    _check_all_read(type(model).__name__, config)
    scale = math.prod(_numbers(config, *_FACTORS))
    for divisor in _numbers(config, _DIVISOR):
        scale *= divisor if config.model_type == _MULTIPLIES else 1 / divisor
    return LogitTransform(scale, next(iter(_numbers(config, *_CAPS)), None))


def check_unscaled(model: nn.Module) -> None:
    """Refuse a model that scales its logits, for callers that hand hidden states to the ops as they are.

    Raises ValueError, as `logit_transform` does, and for a scale other than 1.
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
        # MPT's own code scales, transformers' does not, and both have this config.
        raise ValueError(f"logit_scale of {kind} is {fields['logit_scale']!r}, needs None")
    words = fields.get("unpadded_vocab_size")
    if words is not None and words < config.vocab_size:
        raise ValueError(f"the head of {kind} has {config.vocab_size} rows for {words} words, needs a row a word")
