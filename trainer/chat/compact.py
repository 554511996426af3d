"""The tiny policy's format: every word is one token, and there is no JSON.

    <ref> steps mail_find ... <end> <user> pay the invoice of dana <end> <assistant>
    ok <call> mail_find sender dana <end> <tool> subject invoice amount 42 <end> <assistant> done <end>

Tool schemas are not shown: the tiny policy knows its tools from the warm start. A reference comes before the user
message, so every later token is the same for teacher and student.

Text from outside never becomes a marker: `<end>` in a file is the word `end`, or an unknown one like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from trainer.chat.literals import as_json
from trainer.data import Message, TokenClass, Tool
from trainer.errors import UserError

PAD, UNKNOWN, USER, TOOL, ASSISTANT, REFERENCE, CALL, END = SPECIAL = (
    "<pad>",
    "<unk>",
    "<user>",
    "<tool>",
    "<assistant>",
    "<ref>",
    "<call>",
    "<end>",
)


NUMBER = re.compile("0|[1-9][0-9]{0,17}")


def words_of(value: Any) -> Iterable[str]:
    """Flatten JSON to words: {"day": "open", "hour": 9} is "day open hour 9"."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from words_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from words_of(item)
    else:
        yield from str(value).split()


class CompactRenderer:
    """Messages to word tokens and back, over a word-level tokenizer that has the eight markers."""

    def __init__(self, tokenizer: Any) -> None:
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        missing = [marker for marker in SPECIAL if marker not in self.vocabulary]
        if missing:
            raise UserError(f"model.renderer: compact needs the tokens {' '.join(missing)}, which this tokenizer lacks")
        self.words = {i: word for word, i in self.vocabulary.items()}
        self.unknown = self.vocabulary[UNKNOWN]
        self.end = self.vocabulary[END]
        self.pad_id = self.vocabulary[PAD]
        self.stop_ids = frozenset({self.end})

    def encode(self, words: Iterable[str]) -> list[int]:
        """The ids of words of our own, markers included."""
        return [self.vocabulary.get(word, self.unknown) for word in words]

    def prompt(self, messages: list[Message], tools: list[Tool], reference: str = "") -> list[int]:
        head = [REFERENCE, *_data(reference.split()), END] if reference else []
        return self.encode([*head, *(word for m in messages for word in self._message(m)), ASSISTANT])

    def observation(self, messages: list[Message]) -> list[int]:
        return self.encode([*(word for m in messages for word in self._message(m)), ASSISTANT])

    def _message(self, message: Message) -> list[str]:
        content = message.get("content") or ""
        if message["role"] == "tool":
            return [TOOL, *_data(words_of(_json_or_text(content))), END]
        if message["role"] == "assistant":
            return [ASSISTANT, *self.turn(message), END]
        return [USER, *_data(content.split()), END]

    def turn(self, message: Message) -> list[str]:
        """Return the words of an assistant message, without its end."""
        words = _data((message.get("content") or "").split())
        for call in message.get("tool_calls") or []:
            function = call["function"]
            words += [CALL, *_data([function["name"], *words_of(json.loads(function["arguments"]))])]
        return words

    def parse(self, ids: Sequence[int]) -> tuple[Message, str]:
        segments: list[list[str]] = [[]]
        for token in ids:
            word = self.words.get(token, UNKNOWN)
            if word == CALL:
                segments.append([])
            elif token not in self.stop_ids:
                segments[-1].append(word)
        message: Message = {"role": "assistant", "content": " ".join(segments[0])}
        calls = []
        for i, segment in enumerate(segments[1:]):
            problem = _malformed(segment)
            if problem:
                return message, problem
            arguments = {k: _number_or_word(v) for k, v in zip(segment[1::2], segment[2::2])}
            function = {"name": segment[0], "arguments": json.dumps(arguments)}
            calls.append({"id": f"call_{i}", "type": "function", "function": function})
        if calls:
            message["tool_calls"] = calls
        return message, ""

    def classes(self, ids: Sequence[int]) -> list[int]:
        has_call = self.vocabulary[CALL] in ids
        current = TokenClass.REASONING if has_call else TokenClass.ANSWER
        found = []
        for token in ids:
            if token == self.vocabulary[CALL]:
                found.append(TokenClass.FORMAT)
                current = TokenClass.CALL_NAME
            elif token in self.stop_ids:
                found.append(TokenClass.FORMAT)
            else:
                found.append(current)
                current = TokenClass.ARGUMENT if current == TokenClass.CALL_NAME else current
        return [int(c) for c in found]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.words.get(token, UNKNOWN) + " " for token in ids]


def _data(words: Iterable[str]) -> list[str]:
    """Words from outside, with the markers among them as plain words."""
    return [word.strip("<>") if word in SPECIAL else word for word in words]


def _malformed(segment: list[str]) -> str:
    """The error of a malformed call, or "" for a well-formed one."""
    if not segment:
        return "call without a tool name"
    if len(segment) % 2 == 0:
        return f"{segment[0]} needs pairs of argument and value"
    markers = [word for word in segment if word in SPECIAL]
    return f"{markers[0]} inside a call" if markers else ""


def _number_or_word(word: str) -> int | str:
    """A whole number where the word is its usual spelling, which rules out 007 and the digits of other scripts."""
    return int(word) if NUMBER.fullmatch(word) else word


def _json_or_text(content: str) -> Any:
    try:
        return as_json(json.loads(content))
    except (ValueError, RecursionError):
        return content
