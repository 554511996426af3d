"""A tool in one line of Python: `cd(folder: str)  # Change the current working directory.`

A fifth of the tokens of its JSON schema, which is what a small model on a CPU can afford.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.chat.schemas import properties, resolve
from trainer.data import Tool

NAMES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "array": "list", "object": "dict"}
MAX_DEPTH = 3


def signature(tool: Tool, described: bool = False) -> str:
    """The line for one OpenAI tool; with `described` the first sentence of its description follows."""
    function = tool["function"]
    schema = function.get("parameters") or {}
    required = set(schema.get("required") or ())
    parameters = [_parameter(name, node, name in required, schema) for name, node in properties(schema, schema).items()]
    line = f"{function['name']}({', '.join(parameters)})"
    sentence = re.split(r"(?<=[.!?])\s", " ".join((function.get("description") or "").split()))[0]
    return f"{line}  # {sentence}" if described and sentence else line


def _parameter(name: str, node: Any, required: bool, root: Any) -> str:
    text = f"{name}: {_type(node, root)}"
    return text if required else f"{text} = {node.get('default') if isinstance(node, Mapping) else None!r}"


def _type(node: Any, root: Any, depth: int = 0) -> str:
    """A schema in a few words: its values, else its types; what is deeper than `MAX_DEPTH` references is any."""
    if not isinstance(node, Mapping) or depth > MAX_DEPTH:
        return "any"
    if isinstance(node.get("enum"), list) and node["enum"]:
        return " | ".join(repr(value) for value in node["enum"])
    if "const" in node:
        return repr(node["const"])
    kind = node.get("type")
    if kind is None:
        return _parts(node, root, depth) or "any"
    if isinstance(kind, list):
        return " | ".join(NAMES.get(k, str(k)) for k in kind)
    if kind == "array" and isinstance(node.get("items"), Mapping):
        return f"list[{_type(node['items'], root, depth + 1)}]"
    return NAMES.get(kind, str(kind))


def _parts(node: Mapping[str, Any], root: Any, depth: int) -> str:
    """The types of what a schema is put together from; "" if it says nothing."""
    if isinstance(node.get("$ref"), str):
        return _type(resolve(node["$ref"], root), root, depth + 1)
    for key in ("anyOf", "oneOf"):
        if isinstance(node.get(key), list):
            return " | ".join(dict.fromkeys(_type(one, root, depth + 1) for one in node[key]))
    known = [_type(one, root, depth + 1) for one in node.get("allOf") or ()]
    return next((kind for kind in known if kind != "any"), "")
