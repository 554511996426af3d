"""Tool calls in text, two ways: JSON between tags (Hermes, Qwen) and Python in brackets (BFCL's own form).

    <tool_call>                                             [cd(folder="docs"), ls(a=True)]
    {"name": "cd", "arguments": {"folder": "docs"}}
    </tool_call>

Reading never raises and never runs anything. The text says where a call begins; from there on the payload's own grammar
says where it ends, so a value may spell any marker. Each `Found` keeps the character spans of its parts, for token
classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.chat.literals import Member, as_json, read_object, read_value, read_whole, skip_space

Span = tuple[int, int]
Call = tuple[str, dict[str, Any]]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEYS = ("name", "function", "arguments", "parameters", "id", "type")  # of a call; the last two say nothing here
_FENCE = re.compile(r"```\w*")
_LIST = re.compile(r"^[ \t]*(\[)\s*(?=\w[\w.-]*[ \t]*\()", re.MULTILINE)
_NAME = re.compile(r"\w[\w.-]*")
_KEYWORD = re.compile(r"(\w[\w.-]*)\s*=")


@dataclass
class Found:
    """The parsed parts of a text: the text outside the calls, the calls, the first error, and all their spans."""

    words: str = ""
    calls: list[Call] = field(default_factory=list)
    error: str = ""
    regions: list[Span] = field(default_factory=list)  # all that belongs to calls
    names: list[Span] = field(default_factory=list)
    arguments: list[Span] = field(default_factory=list)

    def add(self, part: Found, region: Span) -> None:
        """Take in what was found in `region`."""
        self.calls += part.calls
        self.error = self.error or part.error
        self.names += part.names
        self.arguments += part.arguments
        self.regions.append(region)

    def moved(self, by: int) -> Found:
        """The same parts in a text with `by` more characters before it."""
        spans = ([(start + by, end + by) for start, end in of] for of in (self.regions, self.names, self.arguments))
        return Found(self.words, self.calls, self.error, *spans)


class Tagged:
    """Calls between `<tool_call>` and `</tool_call>`. A subclass reads the payload of one tag.

    A tag opens a call where it begins a line or follows another call, and anywhere else if a call can be read there:
    inside a line of prose it is a word like others.
    """

    newlines = 1  # that the format puts between an answer's words and its first call

    def read(self, text: str) -> Found:
        found, at, last = Found(), 0, 0
        while (start := text.find(OPEN, at)) >= 0:
            part = Found()
            try:
                end = self.read_payload(text, start + len(OPEN), part)
            except ValueError as error:
                end = _end_of_malformed(text, start + len(OPEN))
                part.calls, part.error = [], f"malformed tool call: {error}"
                part.arguments = [(begin, min(stop, end) if stop >= 0 else end) for begin, stop in part.arguments]
                if not (text[last:start].isspace() or _begins_line(text, start) or last == start):
                    at = start + len(OPEN)
                    continue
            found.add(part, (start, end))
            at = last = end
        found.words = _words(text, found.regions, self.newlines)
        return found

    def read_payload(self, text: str, at: int, part: Found) -> int:
        """Read what follows an opening tag; return where the call ends, its closing tag included.

        Raises:
            ValueError: it is no call; `part` holds the spans that are known, with -1 for an end that is not.
        """
        raise NotImplementedError


class Hermes(Tagged):
    """`<tool_call>` tags around a JSON object."""

    instruction = (
        f'To call a tool, write {OPEN}\\n{{"name": ..., "arguments": {{...}}}}\\n{CLOSE}; several calls may follow '
        "each other."
    )

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]], mark: Callable[[str], str] = str) -> str:
        """The calls as text, with the format's own tags as `mark` gives them."""
        bodies = [_json({"name": name, "arguments": dict(arguments)}) for name, arguments in calls]
        return "\n".join(f"{mark(OPEN)}\n{body}\n{mark(CLOSE)}" for body in bodies)

    def read_payload(self, text: str, at: int, part: Found) -> int:
        at = skip_space(text, at)
        fence = _FENCE.match(text, at)
        at = skip_space(text, fence.end()) if fence else at
        members: list[Member] = []
        try:
            end = read_object(text, at, members)
        finally:
            for member in members:
                if member.key in ("name", "function") and isinstance(member.value, str):
                    part.names.append((member.start + 1, member.end - 1))
                elif member.key in ("arguments", "parameters"):
                    part.arguments.append((member.start, member.end))
        part.calls.append(_call_of(members))
        end = skip_space(text, end)
        if fence and text.startswith("```", end):
            end = skip_space(text, end + 3)
        if text.startswith(CLOSE, end):
            return end + len(CLOSE)
        if end < len(text) and not text.startswith(OPEN, end):
            raise ValueError("something stands after the object")
        return end


class Python:
    """A bracketed list of Python calls with named literal arguments, which begins a line."""

    instruction = 'To call tools, write only a list of calls with named arguments, like [cd(folder="a"), ls(a=True)].'

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]], mark: Callable[[str], str] = str) -> str:
        return f"[{', '.join(f'{name}({_named(arguments)})' for name, arguments in calls)}]" if calls else ""

    def read(self, text: str) -> Found:
        found, at = Found(), 0
        while match := _LIST.search(text, at):
            part, start = Found(), match.start(1)
            try:
                end = _read_calls(text, match.end(), part)
            except ValueError as error:
                at = match.end()
                if not re.match(r"[^\W\d][\w.-]*\(", text[at:]):  # "[see (1)": prose
                    continue
                end = at = len(text)
                part.calls, part.error = [], f"malformed tool call: {error}"
                part.arguments = [(begin, stop if stop >= 0 else end) for begin, stop in part.arguments]
            else:
                at = end
                if text.startswith("(", end):  # a link: "[print()](https://...)"
                    continue
            found.add(part, (start, end))
        found.words = _words(text, found.regions, newlines=1)
        return found


def _read_calls(text: str, at: int, part: Found) -> int:
    """Read the calls of a list up to its bracket; return where it ends."""
    while not text.startswith("]", at):
        name = _NAME.match(text, at)
        opening = skip_space(text, name.end()) if name else at
        if not name or not text.startswith("(", opening):
            raise ValueError("every item must be a call of a tool by its name")
        part.names.append(name.span())
        part.arguments.append((opening + 1, -1))
        arguments, end = _read_keywords(text, opening + 1, name.group())
        part.arguments[-1] = (opening + 1, end)
        part.calls.append((name.group(), arguments))
        at = _after(text, end + 1, "]")
    return at + 1


def _read_keywords(text: str, at: int, name: str) -> tuple[dict[str, Any], int]:
    """The named arguments of a call and where its parenthesis closes."""
    arguments: dict[str, Any] = {}
    at = skip_space(text, at)
    while not text.startswith(")", at):
        keyword = _KEYWORD.match(text, at)
        if not keyword:
            cut = "" if text[at:] else ", and ends too early"
            raise ValueError(f"{name} needs its arguments by name{cut}")
        if keyword.group(1) in arguments:
            raise ValueError(f"{name} needs each argument once, by name")
        arguments[keyword.group(1)], at = read_value(text, skip_space(text, keyword.end()), python=True)
        at = _after(text, at, ")")
    return arguments, at


def _after(text: str, at: int, closing: str) -> int:
    """Where the next item begins, or where `closing` stands."""
    at = skip_space(text, at)
    if text.startswith(",", at):
        return skip_space(text, at + 1)
    if not text.startswith(closing, at):
        raise ValueError(f"needs a comma or {closing}")
    return at


def _begins_line(text: str, at: int) -> bool:
    return not text[text.rfind("\n", 0, at) + 1 : at].strip()


def _end_of_malformed(text: str, at: int) -> int:
    """Where a call ends that cannot be read: with its closing tag, or where another one opens."""
    closing, opening = text.find(CLOSE, at), text.find(OPEN, at)
    if closing >= 0 and not 0 <= opening < closing:
        return closing + len(CLOSE)
    return opening if opening >= 0 else len(text)


def _words(text: str, regions: Sequence[Span], newlines: int) -> str:
    """The text outside the calls, without the line breaks that set the first call apart and the space between calls."""
    if not regions:
        return text
    before = text[: regions[0][0]]
    for _ in range(newlines):
        before = before.removesuffix("\n")
    ends = [*(start for start, _ in regions[1:]), len(text)]
    rest = [text[end:start] for (_, end), start in zip(regions, ends)]
    return before + "".join(part for part in rest if part.strip())


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
    return json.dumps(as_json(value), ensure_ascii=False, allow_nan=False)


def _call_of(members: Sequence[Member]) -> Call:
    name = _one_of(members, "name", "function")
    if not isinstance(name, str) or not name:
        raise ValueError("the name of the tool is missing")
    arguments = _one_of(members, "arguments", "parameters")
    if arguments is None and (others := [m.key for m in members if m.key not in KEYS]):
        raise ValueError(f'the arguments of {name} must stand in "arguments", got "{others[0]}"')
    if isinstance(arguments, str):
        arguments = read_whole(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name} must be an object")
    return name, arguments


def _one_of(members: Sequence[Member], *keys: str) -> Any:
    """The value of the member with one of these keys, or None. Of two, neither is known to be the one that is meant."""
    found = [member.value for member in members if member.key in keys]
    if len(found) > 1:
        raise ValueError(f"needs one of {' and '.join(keys)}, once")
    return found[0] if found else None
