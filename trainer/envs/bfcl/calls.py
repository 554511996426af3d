"""Calls written in Python syntax, parsed with `ast`: a name and literals, nothing that could run."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """`name(*positional, **named)`."""

    name: str
    named: Mapping[str, Any] = field(default_factory=dict)
    positional: tuple[Any, ...] = ()


def parse_call(text: str) -> Call:
    """Read `name(1, key="value")`.

    Raises:
        ValueError: `text` is not one call of a plain name with literal arguments.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError("not a call of a plain name")
        named = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
        if len(named) != len(node.keywords):
            raise ValueError("arguments must be named once each")
        return Call(node.func.id, named, tuple(ast.literal_eval(a) for a in node.args))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a call: {error}") from error
