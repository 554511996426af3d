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
A prompt begins with whatever the tokenizer puts before a text (Llama's BOS; nothing for SmolLM2 and Qwen).
Text from outside never becomes a control token (`markup`): a file that contains `<|im_end|>` ends no turn.
"""

from __future__ import annotations

import json
from typing import Any

from trainer.chat.reader import ChatReader
from trainer.chat.signatures import signature
from trainer.chat.syntax import Hermes, Python
from trainer.data import Message, Tool
from trainer.errors import UserError

CALLS: dict[str, type[Hermes] | type[Python]] = {"hermes": Hermes, "python": Python}
TOOLS = ("json", "signatures", "described")
OPTIONS = "chatml"  # the key in tokenizer_config.json


class ChatMLRenderer(ChatReader):
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
        self._beginning = _beginning(tokenizer)
        self.syntax = CALLS[calls]()
        super().__init__(tokenizer, self.syntax)

    def store_options(self) -> None:
        """Make the tokenizer carry these options wherever it is saved."""
        self.tokenizer.init_kwargs[OPTIONS] = {"calls": self.calls, "tools": self.tools}

    def prompt(self, messages: list[Message], tools: list[Tool], reference: str = "") -> list[int]:
        system, rest = ("", messages)
        if messages and messages[0]["role"] == "system":
            system, rest = str(messages[0].get("content") or ""), messages[1:]
        data, mark = self.markup.data, self.markup.mark
        parts = [data(system)] if system else []
        if tools:
            parts.append(f"# Tools\n{data(self.describe(tools))}\n{mark(self.syntax.instruction)}")
        if reference:
            parts.append(f"# Reference\n{data(reference)}")
        block = self._block("system", "\n\n".join(parts)) if parts else []
        return [*self._beginning, *block, *self._blocks(rest), *self._opening()]

    def describe(self, tools: list[Tool]) -> str:
        """The tools as the system prompt shows them, one per line; those marked "unlisted" are left out."""
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
        data, mark = self.markup.data, self.markup.mark
        text = "\n".join(
            part for part in (data(message.get("content") or ""), self.syntax.write(data(calls), mark)) if part
        )
        thought = message.get("reasoning_content") or ""
        if thought:
            text = f"{mark('<think>')}\n{data(thought)}\n{mark('</think>')}\n\n{text}"
        elif text.lstrip().startswith("<think>"):  # an empty thought before them, as plain: they are none
            text = f"<think>\n\n</think>\n\n{text}"
        return [*self.markup.encode(text), self._end]

    def _opening(self) -> list[int]:
        return [self._start, *self.encode("assistant\n")]

    def _block(self, role: str, content: str) -> list[int]:
        """One message; `content` is marked text."""
        text = f"{self.markup.data(role)}\n{content}"
        return [self._start, *self.markup.encode(text), self._end, *self.encode("\n")]

    def _blocks(self, messages: list[Message]) -> list[int]:
        """Every message as a block; neighbouring tool results share one of the user's."""
        ids: list[int] = []
        results: list[str] = []
        data, (opening, closing) = self.markup.data, map(self.markup.mark, ("<tool_response>", "</tool_response>"))
        for message in [*messages, None]:
            if message is not None and message["role"] == "tool":
                results.append(f"{opening}\n{data(str(message.get('content') or ''))}\n{closing}")
                continue
            if results:
                ids += self._block("user", "\n".join(results))
                results = []
            if message is None:
                break
            if message["role"] == "assistant":
                ids += [*self._opening(), *self.turn(message), *self.encode("\n")]
            else:
                ids += self._block(message["role"], data(str(message.get("content") or "")))
        return ids


def _beginning(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before any text, such as a BOS: the model has never read a text without it."""
    plain, whole = (list(tokenizer("x", add_special_tokens=special)["input_ids"]) for special in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if at is None:
        raise UserError("model.renderer: the tokenizer changes a text where it adds special tokens; chatml needs one")
    return whole[:at]


def _arguments(value: Any) -> dict[str, Any]:
    arguments = json.loads(value) if isinstance(value, str) else value
    return dict(arguments or {})
