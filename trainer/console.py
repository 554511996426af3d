"""Rich's console for text that came from elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from trainer.terminal import visible


class VisibleConsole(Console):
    """Rich's console: its own colours, and the text it is given as `visible` shows it."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(visible(item) if isinstance(item, str) else item for item in objects), **options)
