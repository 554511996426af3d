"""Renderers: from messages to tokens, for each family of models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.errors import UserError
from trainer.protocols import Renderer


def load(
    name: str, tokenizer: Any, template: Mapping[str, Any] | None = None, stop_ids: Iterable[int] = ()
) -> Renderer:
    """Return the renderer `name` over `tokenizer`; tokens `stop_ids` end a turn too (`stop_tokens.of_model`).

    "compact" is for the tiny policy, "chatml" for SmolLM2 and others without a template for tools, "template" for Qwen:
    the model's own chat template, which gets the options `template`.

    Raises:
        UserError: no renderer has that name, or the tokenizer lacks the tokens it needs.
    """
    renderer = _made(name, tokenizer, template)
    renderer.stop_ids |= frozenset(stop_ids)
    return renderer


def _made(name: str, tokenizer: Any, template: Mapping[str, Any] | None) -> Renderer:
    if name == "compact":
        from trainer.chat.compact import CompactRenderer

        return CompactRenderer(tokenizer)
    if name == "chatml":
        from trainer.chat.chatml import ChatMLRenderer

        return ChatMLRenderer(tokenizer)
    if name == "template":
        from trainer.chat.template import TemplateRenderer

        return TemplateRenderer(tokenizer, template)
    raise UserError(f"model.renderer: no renderer is called {name!r}; there are chatml, compact, template")
