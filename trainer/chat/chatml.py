"""ChatML, the chat format of SmolLM2 and Qwen, with tools.

    <|im_start|>system
    ... # Tools ... # Reference ...<|im_end|>
    <|im_start|>user
    ...<|im_end|>
    <|im_start|>assistant
    [cd(folder="docs")]<|im_end|>
    <|im_start|>user
    <tool_response>
    {...}
    </tool_response><|im_end|>
    <|im_start|>assistant

How tools are shown and calls are written is what a model was trained on, so it belongs to the model: the folder's
tokenizer_config.json may hold `"chatml": {"calls": "python", "tools": "signatures"}`, and checkpoints keep it.
Text from outside is encoded with special tokens switched off: a file that contains `<|im_end|>` ends no turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from trainer.chat.bytelevel import ByteLevel
from trainer.chat.signatures import signature
from trainer.chat.syntax import Found, Hermes, Python, Span
from trainer.types import Message, TokenClass, Tool, UserError

START, END = "<|im_start|>", "<|im_end|>"
THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
CALLS: dict[str, type[Hermes] | type[Python]] = {"hermes": Hermes, "python": Python}
TOOLS = ("json", "signatures", "described")
OPTIONS = "chatml"  # the key in tokenizer_config.json


class ChatMLRenderer:
    """Messages to tokens and back.

    Args:
        tokenizer: a byte-level BPE tokenizer that has the ChatML markers.
        calls: "hermes" (JSON in tags) or "python" (`[name(key="value")]`, half the tokens). From the folder, else
            hermes.
        tools: "json" schemas, "signatures" (one line each), or "described" (the same with a sentence). From the
            folder, else signatures.

    Raises:
        UserError: the tokenizer lacks a marker or is not byte-level, or an option has an unknown value.
    """

    def __init__(self, tokenizer: Any, calls: str | None = None, tools: str | None = None):
        stored = tokenizer.init_kwargs.get(OPTIONS) or {}
        calls, self.tools = calls or stored.get("calls", "hermes"), tools or stored.get("tools", "signatures")
        if calls not in CALLS or self.tools not in TOOLS:
            got = f"calls={calls!r}, tools={self.tools!r}"
            raise UserError(f"chatml: got {got}; calls is one of {', '.join(CALLS)}, tools of {', '.join(TOOLS)}")
        self.calls = calls
        self.syntax = CALLS[calls]()
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in (START, END) if token not in vocabulary]:
            raise UserError(f"model.renderer: chatml needs the tokens {' '.join(missing)}, which this tokenizer lacks")
        self.tokenizer = tokenizer
        self._text = ByteLevel(tokenizer)
        self._start, self._end = vocabulary[START], vocabulary[END]
        self.stop_ids = frozenset({self._end})
        self.pad_id = self._end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def store_options(self) -> None:
        """Make the tokenizer carry these options wherever it is saved."""
        self.tokenizer.init_kwargs[OPTIONS] = {"calls": self.calls, "tools": self.tools}

    # Messages to tokens

    def encode(self, text: str) -> list[int]:
        """Plain text: whatever it spells, no special token comes out."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def prompt(self, messages: list[Message], tools: list[Tool], reference: str = "") -> list[int]:
        system, rest = ("", messages)
        if messages and messages[0]["role"] == "system":
            system, rest = str(messages[0].get("content") or ""), messages[1:]
        parts = [system] if system else []
        if tools:
            parts.append(f"# Tools\n{self.describe(tools)}\n{self.syntax.instruction}")
        if reference:
            parts.append(f"# Reference\n{reference}")
        block = self._block("system", "\n\n".join(parts)) if parts else []
        return [*block, *self._blocks(rest), *self._opening()]

    def describe(self, tools: list[Tool]) -> str:
        """The tools as the system prompt shows them, one a line; those marked "unlisted" are left out."""
        tools = [tool for tool in tools if not tool.get("unlisted")]
        if self.tools == "json":
            return "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        return "\n".join(signature(tool, described=self.tools == "described") for tool in tools)

    def observation(self, messages: list[Message]) -> list[int]:
        return [*self.encode("\n"), *self._blocks(messages), *self._opening()]

    def turn(self, message: Message) -> list[int]:
        """An assistant message as the policy would sample it, stop token included: for demonstrations."""
        calls = [
            (call["function"]["name"], _arguments(call["function"].get("arguments")))
            for call in message.get("tool_calls") or []
        ]
        text = "\n".join(part for part in (message.get("content") or "", self.syntax.write(calls)) if part)
        return [*self.encode(text), self._end]

    def _opening(self) -> list[int]:
        return [self._start, *self.encode("assistant\n")]

    def _block(self, role: str, content: str) -> list[int]:
        return [self._start, *self.encode(f"{role}\n{content}"), self._end, *self.encode("\n")]

    def _blocks(self, messages: list[Message]) -> list[int]:
        """Every message as a block; neighbouring tool results share one of the user's."""
        ids: list[int] = []
        results: list[str] = []
        for message in [*messages, None]:
            if message is not None and message["role"] == "tool":
                results.append(f"<tool_response>\n{message.get('content') or ''}\n</tool_response>")
                continue
            if results:
                ids += self._block("user", "\n".join(results))
                results = []
            if message is None:
                break
            if message["role"] == "assistant":
                ids += [*self._opening(), *self.turn(message), *self.encode("\n")]
            else:
                ids += self._block(message["role"], str(message.get("content") or ""))
        return ids

    # Tokens to messages

    def parse(self, ids: Sequence[int]) -> tuple[Message, str]:
        _, found = self._read(ids)
        message: Message = {"role": "assistant", "content": found.words}
        if found.error:
            return {**message, "content": self.decode(self._said(ids)).strip()}, found.error
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

    def _said(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token != self._end]

    def _read(self, ids: Sequence[int]) -> tuple[str, Found]:
        """The text of a turn, and what it holds; a call that is only thought of is no call."""
        text = self.decode(self._said(ids))
        blank = THINK.sub(lambda m: " " * len(m.group()), text)  # same positions
        return text, self.syntax.read(blank)

    def classes(self, ids: Sequence[int]) -> list[int]:
        text, found = self._read(ids)
        plain = TokenClass.REASONING if found.regions else TokenClass.ANSWER
        of_char = [plain] * len(text)
        _paint(of_char, [m.span() for m in THINK.finditer(text)], TokenClass.REASONING)
        _paint(of_char, found.regions, TokenClass.FORMAT)
        _paint(of_char, found.arguments, TokenClass.ARGUMENT)
        _paint(of_char, found.names, TokenClass.CALL_NAME)
        classes, at = [], 0
        pieces = iter(self.pieces(self._said(ids)))
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


def _arguments(value: Any) -> dict[str, Any]:
    arguments = json.loads(value) if isinstance(value, str) else value
    return dict(arguments or {})
