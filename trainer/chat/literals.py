"""Values as models write them: JSON, Python literals, or a mixture of both.

A value is read where it stands, and its own grammar says where it ends. No text is searched for a closing mark and none
is repaired before it is read, so the characters of a string are its own whatever they spell. JSON comes first; what is
no JSON is read token by token, which takes Python's quotes and constants and trailing commas.

`ast.parse` is not used: it can exhaust the C stack on text that nests deeply, and refuses names that tools may have.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

from trainer.text import encodable

MAX_DEPTH = 100  # of nesting: whatever reads a value after us can recurse over it
MAX_INTEGER = 10**4300  # Python writes no larger one in decimal digits
CONSTANTS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}

_JSON = json.JSONDecoder(strict=False)  # takes the line breaks that models leave in strings
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"[-+]?\.?[0-9][0-9A-Za-z_.]*(?:(?<=[eE])[-+][0-9_]+)?")
_WORD = re.compile(r"[^\s,:(){}\[\]\"']+")
_STRING = re.compile(
    r"""([rRuU]?)('''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''|\"\"\"[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*\"\"\""""
    r"""|'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")""",
    re.DOTALL,
)
_UNSPELLED = re.compile(r"\\.|[\n\r\0]", re.DOTALL)  # an escape, which stays, or what a Python string cannot hold
_ESCAPES = {"\n": r"\n", "\r": r"\r", "\0": r"\x00"}
_CLOSING = {"[": "]", "(": ")"}


@dataclass
class Member:
    """A member of an object, and where its value stands; `end` is -1 while the value is unread."""

    key: str
    start: int
    value: Any = None
    end: int = -1


def skip_space(text: str, at: int) -> int:
    """The index of the first character from `at` on that is no whitespace."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


def read_value(text: str, at: int, python: bool = False) -> tuple[Any, int]:
    """The value that begins at `at`, as JSON data, and where it ends. With `python` strings mean what Python says.

    Raises:
        ValueError: there is none, or it is something that JSON cannot say.
    """
    if not python:
        try:
            value, end = _JSON.raw_decode(text, at)
        except (ValueError, RecursionError):
            pass
        else:
            if not text[end : end + 1].isalnum() and text[end : end + 1] not in ("_", "."):  # else: 1_000, 0x1f
                return as_json(value), end
    value, end = _read(text, at, python, 0)
    return as_json(value), end


def read_whole(text: str) -> Any:
    """The one value that `text` holds.

    Raises:
        ValueError: there is none, or something stands after it.
    """
    value, end = read_value(text, skip_space(text, 0))
    if skip_space(text, end) != len(text):
        raise ValueError("something stands after the value")
    return value


def read_object(text: str, at: int, members: list[Member]) -> int:
    """Read the object that begins at `at` into `members`, and say where it ends. Members before a fault are kept.

    Raises:
        ValueError: it is no object, or something in it cannot be read.
    """
    return _read_members(text, at, members, lambda start: read_value(text, start), False, 0)


def as_json(value: Any, depth: int = 0) -> Any:
    """`value` as JSON data: texts encodable, tuples as lists, keys as texts.

    Raises:
        ValueError: JSON cannot say it, or it nests deeper than `MAX_DEPTH`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, int):
        if abs(value) >= MAX_INTEGER:
            raise ValueError("a number has too many digits")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("NaN and infinity are not JSON")
        return value
    if depth == MAX_DEPTH:
        raise ValueError("a value is nested too deeply")
    if isinstance(value, (list, tuple)):
        return [as_json(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_as_key(key): as_json(item, depth + 1) for key, item in value.items()}
    raise ValueError(f"{type(value).__name__} is not JSON")


def _as_key(key: Any) -> str:
    """A key as `json` writes it: texts, and numbers and constants by their spelling."""
    key = as_json(key)
    if isinstance(key, (list, dict)):
        raise ValueError("the keys of an object must be texts")
    return key if isinstance(key, str) else json.dumps(key)


def _read(text: str, at: int, python: bool, depth: int) -> tuple[Any, int]:
    """One value, token by token."""
    if depth > MAX_DEPTH:
        raise ValueError("a value is nested too deeply")
    char = text[at : at + 1]
    if char == "{":
        members: list[Member] = []
        end = _read_members(text, at, members, lambda start: _read(text, start, python, depth + 1), python, depth)
        return {member.key: member.value for member in members}, end
    if char in _CLOSING:
        return _read_items(text, at, python, depth)
    if _STRING.match(text, at):
        return _read_strings(text, at, python)
    if number := _NUMBER.match(text, at):
        return _number(number.group()), number.end()
    word = _WORD.match(text, at)
    if word and word.group() in CONSTANTS:
        return CONSTANTS[word.group()], word.end()
    raise ValueError(f"{_shown(text, at)} is no literal value")


def _read_members(text: str, at: int, members: list[Member], read: Any, python: bool, depth: int) -> int:
    if text[at : at + 1] != "{":
        raise ValueError(f"needs an object, got {_shown(text, at)}")
    at = skip_space(text, at + 1)
    while text[at : at + 1] != "}":
        key, at = _read(text, at, python, depth + 1)
        at = skip_space(text, at)
        if text[at : at + 1] != ":":
            raise ValueError(f"needs a colon after a key, got {_shown(text, at)}")
        member = Member(_as_key(key), skip_space(text, at + 1))
        members.append(member)
        member.value, member.end = read(member.start)
        at = _after_item(text, member.end, "}")
    return at + 1


def _read_items(text: str, at: int, python: bool, depth: int) -> tuple[Any, int]:
    """A list or a tuple; a single value in parentheses is that value."""
    opening, items, comma = text[at], [], False
    at = skip_space(text, at + 1)
    while text[at : at + 1] != _CLOSING[opening]:
        item, end = _read(text, at, python, depth + 1)
        items.append(item)
        at = _after_item(text, end, _CLOSING[opening])
        comma = comma or "," in text[end:at]
    return (items[0] if opening == "(" and len(items) == 1 and not comma else items), at + 1


def _after_item(text: str, at: int, closing: str) -> int:
    """Where the next item begins, or where `closing` stands."""
    at = skip_space(text, at)
    if text[at : at + 1] == ",":
        return skip_space(text, at + 1)
    if text[at : at + 1] != closing:
        raise ValueError(f"needs a comma or {closing}, got {_shown(text, at)}")
    return at


def _read_strings(text: str, at: int, python: bool) -> tuple[str, int]:
    """A string, or several side by side, which Python joins."""
    parts, end = [], at
    while match := _STRING.match(text, at):
        parts.append(_string(match.group(1), match.group(2), python))
        end = match.end()
        at = skip_space(text, end)
    return "".join(parts), end


def _string(prefix: str, quoted: str, python: bool) -> str:
    """The text of one string: by JSON's rules where they apply, else by Python's; the other way round with `python`."""
    rules = [_python_string]
    if not prefix and quoted[0] == '"' and not quoted.startswith('"""'):
        rules.insert(1 if python else 0, _json_string)
    for rule in rules:
        try:
            return rule(prefix, quoted)
        except (ValueError, SyntaxError):
            continue
    raise ValueError(f"{_shown(quoted, 0)} is no string")


def _json_string(prefix: str, quoted: str) -> str:
    text: str = _JSON.decode(quoted)
    return text


def _python_string(prefix: str, quoted: str) -> str:
    if prefix not in ("r", "R"):
        quoted = _UNSPELLED.sub(lambda match: _ESCAPES.get(match.group(), match.group()), quoted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d", which keeps its backslash
        return str(ast.literal_eval(prefix + quoted))


def _number(spelled: str) -> Any:
    try:
        return ast.literal_eval(spelled)
    except (ValueError, SyntaxError, MemoryError):
        raise ValueError(f"{_shown(spelled, 0)} is no number") from None


def _shown(text: str, at: int) -> str:
    """The beginning of what stands at `at`, for a message that a policy reads."""
    return repr(text[at : at + 20]) if text[at:] else "the end"
