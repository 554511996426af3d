"""Renderers: how messages become tokens for a family of models."""

from __future__ import annotations

from typing import Any

from trainer.types import Renderer, UserError


def load(name: str, tokenizer: Any) -> Renderer:
    """Return the renderer `name` ("compact" for the tiny policy, "chatml" for SmolLM2 and Qwen) over `tokenizer`.

    Raises:
        UserError: no renderer has that name, or the tokenizer lacks the tokens it needs.
    """
    if name == "compact":
        from trainer.chat.compact import CompactRenderer

        return CompactRenderer(tokenizer)
    if name == "chatml":
        from trainer.chat.chatml import ChatMLRenderer

        return ChatMLRenderer(tokenizer)
    raise UserError(f"model.renderer: no renderer is called {name!r}; there are chatml, compact")
