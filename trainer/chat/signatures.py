"""A tool in one line of Python: `cd(folder: str)  # Change the current working directory.`

A fifth of the tokens of its JSON schema, which is what a small model on a CPU can afford.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.data import Tool

NAMES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "array": "list", "object": "dict"}


def signature(tool: Tool, described: bool = False) -> str:
    """The line for one OpenAI tool; with `described` the first sentence of its description follows."""
    function = tool["function"]
    schema = function.get("parameters") or {}
    required = set(schema.get("required") or ())
    parameters = [_parameter(name, node, name in required) for name, node in (schema.get("properties") or {}).items()]
    line = f"{function['name']}({', '.join(parameters)})"
    sentence = re.split(r"(?<=[.!?])\s", " ".join((function.get("description") or "").split()))[0]
    return f"{line}  # {sentence}" if described and sentence else line


def _parameter(name: str, node: Mapping[str, Any], required: bool) -> str:
    text = f"{name}: {_type(node)}"
    return text if required else f"{text} = {node.get('default')!r}"


def _type(node: Mapping[str, Any]) -> str:
    if node.get("enum"):
        return " | ".join(repr(value) for value in node["enum"])
    kind = node.get("type", "any")
    if isinstance(kind, list):
        return " | ".join(NAMES.get(k, str(k)) for k in kind)
    if kind == "array" and isinstance(node.get("items"), Mapping):
        return f"list[{_type(node['items'])}]"
    return NAMES.get(kind, str(kind))
