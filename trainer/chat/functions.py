"""Tool calls as Qwen3.5 and Qwen3-Coder write them: a function's name and its parameters in tags, values as plain text.

    <tool_call>
    <function=cd>
    <parameter=folder>
    docs
    </parameter>
    </function>
    </tool_call>

A value is raw text: the format has no escape, so a value may spell the tags themselves. What is read as a tag:

- The layout above, line break by line break, is how the models' templates write a call, and comes first. `</parameter>`
  ends a value there only where the next parameter or the end of the call follows in that layout. A parameter's tag with
  a name that the tool's schema lacks is part of the value before it, if that may be any text. Anything else is too.
- A call that cannot be read so is read with any white space between its tags, and where closing tags are missing.

What stays open is a value that spells the rest of a call in this very layout, with the names of parameters that the
tool has: it is the same text as that other call. Where it makes a parameter occur twice, the call is refused.

A value carries no type of its own. It is read as JSON where the tool's schema allows what it spells, and is text
elsewhere. The form is that of the models' published chat templates; the reading is ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.chat.literals import CONSTANTS, as_json, read_whole
from trainer.chat.schemas import allows, properties
from trainer.chat.syntax import CLOSE, Found, Tagged


@dataclass(frozen=True)
class Layout:
    """Where tags stand."""

    head: re.Pattern[str]  # after <tool_call>: the name of the function
    opening: re.Pattern[str]  # of the first parameter
    boundary: re.Pattern[str]  # between two parameters
    end: re.Pattern[str]  # of the last parameter, if any, and the function, with </tool_call> or before another
    another: re.Pattern[str]  # the beginning of a further call
    follows: re.Pattern[str]  # what stands behind the end of a call: nothing, or another


def _layout(gap: str, before: str, after: str) -> Layout:
    """`gap` stands between tags, `before` ahead of the tag that ends a value, `after` behind the one that begins it."""
    closed = rf"{before}</parameter>{gap}"
    return Layout(
        head=re.compile(rf"{gap}<function=([^>\n]*)>{gap}"),
        opening=re.compile(rf"<parameter=([^>\n]*)>{after}"),
        boundary=re.compile(rf"{closed}<parameter=([^>\n]*)>{after}"),
        end=re.compile(rf"({closed})?(</function>)(?:{gap}</tool_call>|(?={gap}<function=))"),
        another=re.compile(rf"{before}<tool_call>{gap}<function="),
        follows=re.compile(rf"\s*\Z|{gap}<tool_call>{gap}<function="),
    )


EXACT = _layout(gap=r"\n", before=r"(?<=\n)", after=r"\n")
LOOSE = _layout(gap=r"\s*", before="", after="")


class Functions(Tagged):
    """Reads `<function=...>` blocks. `schemas` maps the name of a tool to its JSON schema of parameters."""

    newlines = 2

    def __init__(self) -> None:
        self.schemas: dict[str, Mapping[str, Any]] = {}

    def read_payload(self, text: str, at: int, part: Found) -> int:
        while True:
            end = self._read_exact(text, at, part)
            at = self._read_loose(text, at, part) if end is None else end
            if text.endswith(CLOSE, 0, at) or not LOOSE.head.match(text, at):  # else another function in the same tag
                return at

    def _read_exact(self, text: str, at: int, part: Found) -> int | None:
        """Read a call in the template's own layout; return where it ends, or None if this is none."""
        head = EXACT.head.match(text, at)
        end = _end(text, head.end(), EXACT) if head else None
        if not head or not end:
            return None
        name, body = head.group(1).strip(), text[head.end() : end.start()]
        given = self._split(body, EXACT, name) if end.group(1) else []
        if not name or given is None:
            return None
        self._add(name, given, part, head.span(1), (head.end(), end.start(2)))
        return end.end()

    def _read_loose(self, text: str, at: int, part: Found) -> int:
        head = LOOSE.head.match(text, at)
        if not head:
            raise ValueError("the name of the tool is missing")
        name, (body_end, end) = head.group(1).strip(), _loose_end(text, head.end())
        body = text[head.end() : body_end].strip()
        given = self._split(body.removesuffix("</parameter>"), LOOSE, name) if body else []
        problem = ""
        if not name:
            problem = "the name of the tool is missing"
        elif given is None or (body and not body.endswith("</parameter>")) or any(_is_torn(text) for _, text in given):
            problem = f"the parameters of {name} must each stand in <parameter=...> tags"
        self._add(name, [] if problem else given or [], part, head.span(1), (head.end(), body_end))
        if problem:
            raise ValueError(problem)
        return end

    def _add(
        self, name: str, given: list[tuple[str, str]], part: Found, named: tuple[int, int], body: tuple[int, int]
    ) -> None:
        """Add a call to `part`, and where its name and its parameters stand."""
        part.names.append(named)
        part.arguments.append(body)
        if len({key for key, _ in given}) != len(given):
            raise ValueError(f"{name} needs each parameter once")
        root = self.schemas.get(name)
        known = properties(root, root)
        part.calls.append((name, {key: value_of(text, known.get(key), root) for key, text in given}))

    def _split(self, body: str, layout: Layout, name: str) -> list[tuple[str, str]] | None:
        """Each parameter's name and text, or None where a body does not begin with a parameter. `body` ends before the
        closing tag of the last. One line break after an opening and before a closing tag is the layout's."""
        opening = layout.opening.match(body)
        if not opening:
            return None
        root = self.schemas.get(name) or {}
        known = properties(root, root)
        closed = known and not root.get("additionalProperties") and not root.get("patternProperties")
        tags = [opening]
        for tag in layout.boundary.finditer(body, opening.end()):
            current = tags[-1].group(1).strip()
            unknown = closed and tag.group(1).strip() not in known
            if unknown and allows(known.get(current), body[tags[-1].end() : tag.end()], root):
                continue  # it is no parameter of the tool, and the one before may hold any text
            tags.append(tag)
        ends = [*(tag.start() for tag in tags[1:]), len(body)]
        texts = [body[tag.end() : end].removesuffix("\n") for tag, end in zip(tags, ends)]
        if layout is LOOSE:
            texts = [text.removeprefix("\n") for text in texts]
        return [(tag.group(1).strip(), text) for tag, text in zip(tags, texts)]


def _end(text: str, at: int, layout: Layout) -> re.Match[str] | None:
    """The end of the function whose parameters begin at `at`: the first after which nothing, another function or
    another call stands; where words follow instead, the last before another call."""
    last = None
    if text.find("</function>", at) < 0:  # quick, for a text that opens calls without end
        return None
    for end in layout.end.finditer(text, at):
        if end.group(1) is None and end.start() != at:
            continue  # it closes no parameter, so it is part of a value
        if last and layout.another.search(text, last.end(), end.start()):
            return last
        shared = not end.group().endswith(CLOSE)
        if shared or layout.follows.match(text, end.end()):
            return end
        last = end
    return last


def _loose_end(text: str, at: int) -> tuple[int, int]:
    """Where the parameters of a call end, and the call itself, in any layout and with closing tags missing."""
    another = LOOSE.another.search(text, at)
    limit = another.start() if another else len(text)
    if end := _end(text[:limit], at, LOOSE):
        return end.start(2), end.end()
    body = text[at:limit].rstrip()
    if (closing := body.rfind(CLOSE)) >= 0:
        limit, body = at + closing + len(CLOSE), body[:closing].rstrip()
    return at + len(body.removesuffix("</function>")), limit


def _is_torn(text: str) -> bool:
    """Whether a parameter is closed and another opened within a value, with something between them."""
    closed = text.find("</parameter>")
    return 0 <= closed < text.rfind("<parameter=")


def value_of(text: str, schema: Any, root: Any = None) -> Any:
    """The value that a parameter's text stands for: JSON where `schema` allows what it spells, else the text itself."""
    try:
        value = CONSTANTS[text] if text in CONSTANTS else as_json(json.loads(text))
    except (ValueError, RecursionError):
        value = text
    if isinstance(value, str):  # quotes around a text are part of it
        value = text
    elif allows(schema, value, root):
        return value
    if not allows(schema, text, root):  # a list or an object in Python's spelling
        try:
            value = read_whole(text)
        except ValueError:
            return text
        return value if not isinstance(value, str) and allows(schema, value, root) else text
    return text
