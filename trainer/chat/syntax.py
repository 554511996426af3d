"""Tool calls in text, two ways: JSON between tags (Hermes, Qwen) and Python in brackets (BFCL's own form).

    <tool_call>                                             [cd(folder="docs"), ls(a=True)]
    {"name": "cd", "arguments": {"folder": "docs"}}
    </tool_call>

Reading never raises and never runs anything: JSON is parsed as JSON or as a literal, Python by `ast`, literals only.
Each `Found` keeps the character spans of its parts, for token classes.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Span = tuple[int, int]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TAGGED = re.compile(rf"{OPEN}(.*?)(?:{CLOSE}|(?={OPEN})|\Z)", re.DOTALL)
_NAME = re.compile(r"[\"'](?:name|function)[\"']\s*:\s*[\"']([^\"']*)[\"']")
_ARGUMENTS = re.compile(r"[\"'](?:arguments|parameters)[\"']\s*:\s*")
_FENCE = re.compile(r"^```\w*\s*|\s*```$")
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
_BRACKET = re.compile(r"^[ \t]*(\[)[ \t]*(?=[A-Za-z_]\w*[ \t]*\()", re.MULTILINE)
_PYTHON_NAME = re.compile(r"(?<![\w.\"'])([A-Za-z_]\w*)[ \t]*\(")


@dataclass
class Found:
    """The parsed parts of a text: the text outside the calls, the calls, the first error, and all their spans."""

    words: str
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    error: str = ""
    regions: list[Span] = field(default_factory=list)  # all that belongs to calls
    names: list[Span] = field(default_factory=list)
    arguments: list[Span] = field(default_factory=list)


class Hermes:
    """`<tool_call>` tags around a JSON object."""

    instruction = (
        f'To call a tool, write {OPEN}\\n{{"name": ..., "arguments": {{...}}}}\\n{CLOSE}; several calls may follow '
        "each other."
    )

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]], mark: Callable[[str], str] = str) -> str:
        """The calls as text, with the format's own tags as `mark` gives them."""
        bodies = [_json({"name": name, "arguments": dict(arguments)}) for name, arguments in calls]
        return "\n".join(f"{mark(OPEN)}\n{body}\n{mark(CLOSE)}" for body in bodies)

    def read(self, text: str) -> Found:
        found = Found(TAGGED.sub("", text).strip())
        for match in TAGGED.finditer(text):
            found.regions.append(match.span())
            body, start = match.group(1), match.start(1)
            if name := _NAME.search(body):
                found.names.append((start + name.start(1), start + name.end(1)))
            if arguments := _ARGUMENTS.search(body):
                found.arguments.append((start + arguments.end(), start + len(body.rstrip().removesuffix("}"))))
            try:
                found.calls.append(_call_of(_lenient_json(body)))
            except (ValueError, RecursionError, MemoryError) as error:
                found.error = found.error or f"malformed tool call: {error}"
        return found


class Python:
    """A bracketed list of Python calls with named literal arguments, on a line of its own."""

    instruction = 'To call tools, write only a list of calls with named arguments, like [cd(folder="a"), ls(a=True)].'

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]], mark: Callable[[str], str] = str) -> str:
        return f"[{', '.join(f'{name}({_named(arguments)})' for name, arguments in calls)}]" if calls else ""

    def read(self, text: str) -> Found:
        match = _BRACKET.search(text)
        if not match:
            return Found(text.strip())
        start = match.start(1)
        body = text[start:].rstrip()
        found = Found(text[:start].strip(), regions=[(start, len(text))])
        try:
            tree = ast.parse(body, mode="eval").body
            if not isinstance(tree, ast.List):
                raise ValueError("needs a list of calls")
            found.calls = [_python_call(node) for node in tree.elts]
        except SyntaxError as error:
            found.error = f"malformed tool call: {error.msg}"
        except (ValueError, RecursionError, MemoryError) as error:
            found.error = f"malformed tool call: {error}"
        self._mark(body, start, found)
        return found

    @staticmethod
    def _mark(body: str, start: int, found: Found) -> None:
        """Names and what stands in their parentheses, by a scan that also serves malformed text."""
        at = 0
        while match := _PYTHON_NAME.search(body, at):
            end = _closing(body, match.end())
            found.names.append((start + match.start(1), start + match.end(1)))
            found.arguments.append((start + match.end(), start + end))
            at = end


def _closing(text: str, at: int) -> int:
    """The index of the parenthesis that closes the one before `at`, or the end; brackets in strings do not count."""
    depth, quote = 1, ""
    while at < len(text):
        char = text[at]
        if quote:
            if char == "\\":
                at += 1
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return min(at, len(text))


def _python_call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("every item must be a call of a tool by its name")
    if node.args:
        raise ValueError(f"{node.func.id} needs its arguments by name")
    names = [word.arg for word in node.keywords]
    if None in names or len(set(names)) != len(names):
        raise ValueError(f"{node.func.id} needs each argument once, by name")
    arguments = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    _json(arguments)  # arguments must be JSON values: no bytes, sets or complex numbers
    return node.func.id, arguments


def _named(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_python(value)}" for name, value in arguments.items())


def _python(value: Any) -> str:
    """A literal, with double quotes wherever JSON and Python agree on the spelling."""
    if isinstance(value, str):
        return _json(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_python(k)}: {_python(v)}' for k, v in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_python(v) for v in value)}]"
    return repr(value)


def _json(value: Any) -> str:
    """JSON as models write it.

    Raises:
        ValueError: `value` holds something JSON cannot say.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _lenient_json(text: str) -> Any:
    """JSON, or what a model takes for JSON: fenced, with trailing commas, or with Python's quotes and constants."""
    text = _FENCE.sub("", text.strip())
    try:
        return json.loads(text, strict=False)
    except ValueError as error:
        first = error
    repaired = _TRAILING_COMMA.sub(r"\1", text)
    try:
        return json.loads(repaired, strict=False)
    except ValueError:
        pass
    try:
        return ast.literal_eval(repaired)
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(str(first)) from None


def _call_of(value: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise ValueError("needs an object with name and arguments")
    name = value.get("name", value.get("function"))
    if not isinstance(name, str) or not name:
        raise ValueError("the name of the tool is missing")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _lenient_json(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise ValueError(f"the arguments of {name} must be an object")
    return name, json.loads(_json(arguments))
