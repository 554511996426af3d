"""The tokens that end a turn by a model folder's own word, beside the one that a renderer writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def of_model(model: Any, tokenizer: Any) -> frozenset[int]:
    """The end-of-sequence ids of generation_config.json, config.json and the tokenizer, in the model's vocabulary.

    What samples a turn elsewhere (transformers' `generate`, vLLM) stops at each of them: a policy that was trained to
    end so would here go on behind its own end. A value that is no id of the vocabulary (None, -1, ...) is left out: it
    can never be sampled.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    config = model.config
    sources = [getattr(model, "generation_config", None), config, config.get_text_config(), tokenizer]
    found = (one for source in sources for one in _each(getattr(source, "eos_token_id", None)))
    return frozenset(one for one in found if 0 <= one < rows)


def _each(value: Any) -> Iterator[int]:
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, int) and not isinstance(one, bool):
            yield one
