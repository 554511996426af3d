"""Tool calls as Qwen3.5 and Qwen3-Coder write them: a function's name and its parameters in tags, values as plain text.

    <tool_call>
    <function=cd>
    <parameter=folder>
    docs
    </parameter>
    </function>
    </tool_call>

A value carries no type of its own: a text stays text where the tool's schema says so, and is read as JSON elsewhere.
The form is that of the models' published chat templates; the reading is ours, never raises and never runs anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from trainer.chat.syntax import TAGGED, Found

FUNCTION = re.compile(r"<function=([^>\n]*)>(.*?)(?:</function>|\Z)", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]*)>\n?(.*?)\n?</parameter>", re.DOTALL)
CONSTANTS = {"True": True, "False": False, "None": None}  # the template's spelling of JSON constants


class Functions:
    """Reads `<function=...>` blocks. `schemas` maps the name of a tool to its JSON schema of parameters."""

    def __init__(self) -> None:
        self.schemas: dict[str, Mapping[str, Any]] = {}

    def read(self, text: str) -> Found:
        found = Found(TAGGED.sub("", text).strip())
        for block in TAGGED.finditer(text):
            found.regions.append(block.span())
            functions = list(FUNCTION.finditer(block.group(1)))
            if not functions:
                found.error = found.error or "malformed tool call: the name of the tool is missing"
            for match in functions:
                self._read_one(match, block.start(1), found)
        return found

    def _read_one(self, match: re.Match[str], start: int, found: Found) -> None:
        name, body = match.group(1).strip(), match.group(2)
        found.names.append((start + match.start(1), start + match.end(1)))
        found.arguments.append((start + match.start(2), start + match.end(2)))
        given = PARAMETER.findall(body)
        problem = ""
        if not name:
            problem = "the name of the tool is missing"
        elif PARAMETER.sub("", body).strip():
            problem = f"the parameters of {name} must each stand in <parameter=...> tags"
        elif len({parameter for parameter, _ in given}) != len(given):
            problem = f"{name} needs each parameter once"
        if problem:
            found.error = found.error or f"malformed tool call: {problem}"
            return
        found.calls.append((name, {p.strip(): self._value(name, p.strip(), value) for p, value in given}))

    def _value(self, name: str, parameter: str, text: str) -> Any:
        kind = _types(((self.schemas.get(name) or {}).get("properties") or {}).get(parameter))
        if kind == {"string"}:
            return text
        if text in CONSTANTS:
            return CONSTANTS[text]
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return text
        return text if isinstance(value, str) else value  # quotes around a text are part of it


def _types(schema: Any) -> set[str]:
    """The JSON types that a parameter's schema allows; empty where it says nothing."""
    if not isinstance(schema, Mapping):
        return set()
    if isinstance(schema.get("enum"), list):
        return {"string"} if all(isinstance(value, str) for value in schema["enum"]) else set()
    kind = schema.get("type")
    return {kind} if isinstance(kind, str) else set(kind or ())


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
