"""Renderers: how messages become tokens for a family of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.errors import UserError
from trainer.protocols import Renderer


def load(name: str, tokenizer: Any, template: Mapping[str, Any] | None = None) -> Renderer:
    """Return the renderer `name` over `tokenizer`.

    "compact" is for the tiny policy, "chatml" for SmolLM2 and others without a template for tools, "template" for Qwen:
    the model's own chat template, which gets the options `template`.

    Raises:
        UserError: no renderer has that name, or the tokenizer lacks the tokens it needs.
    """
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
