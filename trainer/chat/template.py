"""The tokenizer's own chat template, for models of the ChatML family that were trained with one (Qwen2.5 to Qwen3.6).

The first prompt equals the output of `apply_chat_template`, token by token. After it nothing is rendered again: such
templates drop the thoughts of earlier turns, so the policy would not read what it sampled. Turns keep their sampled
tokens, and an observation is the text that the template puts after a turn, cut out of a short conversation.

Text from outside is distinguished from the template's: a file that contains `<|im_end|>` ends no turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from trainer.chat.functions import Functions
from trainer.chat.reader import CLOSED, END, OPENED, START, ChatReader
from trainer.chat.syntax import Hermes
from trainer.data import Message, Tool
from trainer.errors import UserError

MARK = "\U0010fffd"  # an unassigned character in the place of a turn's text
STAND_INS = 0x100000  # the first of those that replace special tokens spelled in text from outside
USER: Message = {"role": "user", "content": "x"}
PROBE: Tool = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {}}}


class TemplateRenderer(ChatReader):
    """Messages to tokens and back.

    Args:
        tokenizer: a byte-level BPE tokenizer with a ChatML template.
        options: given to the template, such as `enable_thinking`.

    Raises:
        UserError: there is no template, or it is not of a kind whose turns and calls can be read here.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tokenizer, Hermes())
        self.options = dict(options or {})
        self._schemas: dict[str, Mapping[str, Any]] = {}
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("(" + "|".join(re.escape(s) for s in sorted(special, key=len, reverse=True)) + ")")
        self._stand_ins = {text: chr(STAND_INS + n) for n, text in enumerate(special)}
        self._learn_template()

    # Detecting the kind of template

    def _learn_template(self) -> None:
        """Learn the template's format from short conversations."""
        if not self.tokenizer.chat_template:
            raise _unknown("there is none")
        call = {"type": "function", "function": {"name": "probe", "arguments": {"a": MARK}}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            opening = self._text_of([USER]).rpartition(START)[2]
            called = self._text_of([USER, calling], [PROBE], opened=False).rpartition(START)[2]
            observed = self._after_turn([{"role": "tool", "content": "seen"}])
        except UserError as error:
            raise _unknown(str(error)) from None
        if not opening.startswith("assistant\n") or "seen" not in observed:
            raise _unknown(f"a turn must open with {START}assistant and tool results must be shown")
        if "<think>" in opening:
            self.think = CLOSED if "</think>" in opening else OPENED
        if "<function=probe>" in called and "<parameter=a>" in called:
            self.reading = Functions()
            self._schemas = self.reading.schemas
        elif not re.search(r'<tool_call>\s*{"name": "probe", "arguments": {', called):
            raise _unknown("it writes tool calls neither as JSON in <tool_call> nor as <function=...>")

    # Messages to tokens

    def prompt(self, messages: list[Message], tools: list[Tool], reference: str = "") -> list[int]:
        listed = [tool for tool in tools if not tool.get("unlisted")]
        self._schemas.update({t["function"]["name"]: t["function"].get("parameters") or {} for t in tools})
        return self._encode(self._text_of(_with_reference(messages, reference), listed))

    def observation(self, messages: list[Message]) -> list[int]:
        return self._encode(self._after_turn(messages))

    def turn(self, message: Message) -> list[int]:
        """An assistant message as the policy would sample it, stop token included: for demonstrations."""
        before, whole = self._text_of([USER]), self._text_of([USER, message], opened=False)
        assert whole.startswith(before), "the template does not open a turn as it writes one"
        return self._encode(whole[len(before) :].partition(END)[0] + END)

    def _after_turn(self, messages: list[Message]) -> str:
        """What the template writes between the end of a turn and the opening of the next."""
        turn = {"role": "assistant", "content": MARK}
        return self._text_of([USER, turn, *messages]).partition(MARK + END)[2]

    def _text_of(self, messages: list[Message], tools: list[Tool] | None = None, opened: bool = True) -> str:
        """The template's text; special tokens that a message spells are replaced by characters without a meaning."""
        from jinja2 import TemplateError

        shown = _map(self._hide, [_with_objects(message) for message in messages])
        try:
            text: str = self.tokenizer.apply_chat_template(
                shown,
                tools=_map(self._hide, tools) or None,
                add_generation_prompt=opened,
                tokenize=False,
                **self.options,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"model.renderer: the chat template refuses a conversation ({error})") from error
        return text

    def _hide(self, text: str) -> str:
        return self._special.sub(lambda match: self._stand_ins[match.group()], text)

    def _encode(self, text: str) -> list[int]:
        """The tokens of a rendered text: special ones where the template wrote them, and nowhere else."""
        ids: list[int] = []
        for part in self._special.split(text):
            if part in self._stand_ins:
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
            elif part:
                for special, stand_in in self._stand_ins.items():
                    part = part.replace(stand_in, special)
                ids += self.encode(part)
        return ids


def _with_reference(messages: list[Message], reference: str) -> list[Message]:
    """The reference at the end of the system message; without one, before the words of the first user."""
    if not reference:
        return messages
    block = f"# Reference\n{reference}"
    first, *rest = messages
    parts = [first["content"], block] if first["role"] == "system" else [block, first["content"]]
    return [{**first, "content": "\n\n".join(part for part in parts if part)}, *rest]


def _with_objects(message: Message) -> Message:
    """Arguments as objects, which every template takes; the OpenAI format has them as JSON text. A thought stands in
    `reasoning_content` alone: where that is left out, templates look for one in the words."""
    if message["role"] == "assistant":
        message = {"reasoning_content": "", **message}
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"].get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "content": message.get("content") or "", "tool_calls": calls}


def _map(change: Callable[[str], str], value: Any) -> Any:
    """`change` every text in nested data; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(change, item) for key, item in value.items()}
    return [_map(change, item) for item in value] if isinstance(value, list) else value


def _unknown(why: str) -> UserError:
    return UserError(
        f"model.renderer: the tokenizer's chat template is none that `template` knows ({why}); "
        "use --model.renderer chatml, or give the folder a ChatML template"
    )
