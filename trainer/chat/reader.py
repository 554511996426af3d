"""Reading what a ChatML policy generated: tokens to text, to messages, and to what each token is for.

Shared by the renderers that write the prompt themselves (`chatml`) and by the model's own template (`template`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from trainer.chat.bytelevel import ByteLevel
from trainer.chat.syntax import Found, Span
from trainer.data import Message, TokenClass
from trainer.errors import UserError

START, END = "<|im_start|>", "<|im_end|>"
THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
OPENED = re.compile(r"(?:<think>|\A).*?(?:</think>|\Z)", re.DOTALL)  # the prompt ended inside the first thought


class Syntax(Protocol):
    """How calls are written in text."""

    def read(self, text: str) -> Found: ...


class ChatReader:
    """Token ids of one assistant turn to a message, text, pieces and classes.

    Args:
        tokenizer: a byte-level BPE tokenizer that has the ChatML markers.
        syntax: of tool calls.

    Raises:
        UserError: the tokenizer lacks a marker or is not byte-level.
    """

    def __init__(self, tokenizer: Any, syntax: Syntax) -> None:
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in (START, END) if token not in vocabulary]:
            raise UserError(f"model.renderer: chatml needs the tokens {' '.join(missing)}, which this tokenizer lacks")
        self.tokenizer = tokenizer
        self.reading = syntax
        self.think = THINK
        self._text = ByteLevel(tokenizer)
        self._start, self._end = vocabulary[START], vocabulary[END]
        self.stop_ids = frozenset({self._end})
        self.pad_id = self._end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def encode(self, text: str) -> list[int]:
        """Plain text: whatever it spells, no special token comes out."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def parse(self, ids: Sequence[int]) -> tuple[Message, str]:
        _, found = self._read(ids)
        message: Message = {"role": "assistant", "content": found.words}
        if found.error:
            return {**message, "content": self.decode(self._without_end(ids)).strip()}, found.error
        if found.calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{n}",
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
                }
                for n, (name, arguments) in enumerate(found.calls)
            ]
        return message, ""

    def _without_end(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token != self._end]

    def _read(self, ids: Sequence[int]) -> tuple[str, Found]:
        """The text of a turn, and what it holds; a call inside a thought is none."""
        text = self.decode(self._without_end(ids))
        blank = self.think.sub(lambda m: " " * len(m.group()), text)  # same positions
        return text, self.reading.read(blank)

    def classes(self, ids: Sequence[int]) -> list[int]:
        text, found = self._read(ids)
        plain = TokenClass.REASONING if found.regions else TokenClass.ANSWER
        of_char = [plain] * len(text)
        _paint(of_char, [m.span() for m in self.think.finditer(text)], TokenClass.REASONING)
        _paint(of_char, found.regions, TokenClass.FORMAT)
        _paint(of_char, found.arguments, TokenClass.ARGUMENT)
        _paint(of_char, found.names, TokenClass.CALL_NAME)
        classes, at = [], 0
        pieces = iter(self.pieces(self._without_end(ids)))
        for token in ids:
            piece = "" if token == self._end else next(pieces)
            classes.append(int(_of_token(of_char, at, at + len(piece), stop=token == self._end)))
            at += len(piece)
        return classes

    def decode(self, ids: Sequence[int]) -> str:
        return self._text.decode(ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return self._text.pieces(ids)


def _paint(of_char: list[TokenClass], spans: list[Span], value: TokenClass) -> None:
    for start, end in spans:
        of_char[start:end] = [value] * (min(end, len(of_char)) - start)


def _of_token(of_char: list[TokenClass], start: int, end: int, stop: bool) -> TokenClass:
    """The most telling class among a token's characters; one that only begins a character shares the next one's."""
    if stop:
        return TokenClass.FORMAT
    covered = of_char[start:end] or of_char[start : start + 1] or of_char[-1:]
    for value in (TokenClass.CALL_NAME, TokenClass.ARGUMENT, TokenClass.REASONING, TokenClass.ANSWER):
        if value in covered:
            return value
    return TokenClass.FORMAT
