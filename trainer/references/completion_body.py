"""The body of an answer to a chat request, in any of the forms in which servers send it.

One JSON object is what OpenAI sends. Others send events (SSE) or lines of JSON although no stream was asked for, begin
with a byte-order mark, give content as a list of parts or as an object, or put a model's whole answer into its
thoughts. What is read here is text only: whether it is a reference is for `writer_prompt` to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LINE = re.compile(r"\r\n|\n|\r")  # not str.splitlines: U+2028 may stand inside a string of JSON
BETWEEN = re.compile(r"[\s,\x1e]*")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TRUNCATED = ("length", "max_tokens", "max_output_tokens")


class NotACompletion(ValueError):
    """A body that is no answer to a chat request."""


class ErrorInBody(Exception):
    """An error that came with status 200: `body` is what the endpoint says about it, `status` its code or None."""

    def __init__(self, body: Any) -> None:
        super().__init__("error in an answer of status 200")
        self.body = body
        code = str(body.get("code", body.get("status"))) if isinstance(body, Mapping) else ""
        self.status = int(code) if re.fullmatch(r"[45][0-9][0-9]", code) else None


@dataclass(frozen=True)
class Completion:
    """What a server answered: the text of its first choice, why it ended, and the tokens that it counted, if it did."""

    text: str
    truncated: bool = False
    refused: bool = False
    total_tokens: int | None = None
    completion_tokens: int | None = None


def read_completion(body: bytes) -> Completion:
    """The completion that a body holds.

    Raises:
        NotACompletion: it holds none.
        ErrorInBody: it says what went wrong instead.
    """
    return completion_of(list(_documents(body)))


def _documents(body: bytes) -> Iterator[Any]:
    """The JSON values of a body: the whole of it, one per event, or one after the other."""
    text = body.decode(json.detect_encoding(body), "replace").lstrip("\ufeff \t\r\n")
    values = list(_values(text))
    if not values:
        events = "\n".join(line[5:].strip() for line in LINE.split(text) if line.startswith("data:"))
        values = list(_values(events, skip=True))
    for value in values:
        yield from value if isinstance(value, list) else [value]


def _values(text: str, *, skip: bool = False) -> Iterator[Any]:
    """JSON values one after the other, up to the first that is none, or without the lines that are none."""
    decoder, at = json.JSONDecoder(strict=False), 0
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
            yield value
        except (ValueError, RecursionError):
            end = text.find("\n", at) if skip else -1
            if end < 0:
                return
        at = BETWEEN.match(text, end).end()  # type: ignore[union-attr]  # it matches nothing too


def completion_of(documents: list[Any]) -> Completion:
    """One completion of the parts in which it came; see `read_completion`."""
    messages, deltas = _Parts(), _Parts()
    finish, total, written, found = "", None, None, False
    for document in documents:
        if not isinstance(document, Mapping):
            continue
        choice = _first_choice(document)
        if error := document.get("error") or (choice or {}).get("error"):
            raise ErrorInBody(error)
        total = _count(document, "total_tokens") or total
        written = _count(document, "completion_tokens") or written
        if choice is None:
            continue
        found = True
        finish = str(choice.get("finish_reason") or choice.get("done_reason") or finish)
        if isinstance(delta := choice.get("delta"), Mapping):
            deltas.add(delta)
        message = choice.get("message", choice if "delta" not in choice else None)
        if isinstance(message, Mapping):
            messages.add(message)
        elif isinstance(message, str):
            messages.add({"content": message})
    if not found:
        raise NotACompletion
    text = messages.text() or deltas.text()
    return Completion(text, finish.lower() in TRUNCATED, messages.refused or deltas.refused, total, written)


def _first_choice(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first choice; a document without choices may be one itself, as native formats of servers have it."""
    choices = document.get("choices")
    if isinstance(choices, list):
        return next((c for c in choices if isinstance(c, Mapping) and not c.get("index")), None)
    return document if {"message", "delta"} & document.keys() and "choices" not in document else None


class _Parts:
    """What messages, or pieces of one, say and think."""

    def __init__(self) -> None:
        self.said, self.thought, self.refused = "", "", False

    def add(self, message: Mapping[str, Any]) -> None:
        content = message.get("content")
        self.said += text_of_content(message.get("text") if content is None else content)
        self.thought += next((text for name in THOUGHTS if (text := text_of_content(message.get(name)))), "")
        self.refused = self.refused or bool(message.get("refusal"))

    def text(self) -> str:
        """What was said, or, where nothing was, the thoughts: a model that never ends them may have answered there."""
        return self.said if self.said.strip() else self.thought


def text_of_content(content: Any) -> str:
    """The text of a message's content: a string, a list of parts without the thoughts among them, or an object."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(text_of_content(part) for part in content)
    if not isinstance(content, Mapping):
        return ""
    if "type" not in content and "text" not in content:  # the server has parsed the answer already
        return json.dumps(content, ensure_ascii=False)
    text = content.get("text")
    value = text.get("value") if isinstance(text, Mapping) else text
    return value if isinstance(value, str) else ""


def _count(document: Mapping[str, Any], what: str) -> int | None:
    """Tokens as the server counts them."""
    usage = document.get("usage")
    if not isinstance(usage, Mapping):
        return None
    total = usage.get(what)
    return total if type(total) is int else None  # no bool
