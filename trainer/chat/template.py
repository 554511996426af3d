"""The tokenizer's own chat template, for models of the ChatML family that were trained with one (Qwen2.5 to Qwen3.6).

The first prompt equals the output of `apply_chat_template`, token by token. After it nothing is rendered again: such
templates drop the thoughts of earlier turns, so the policy would not read what it sampled. Turns keep their sampled
tokens, and an observation is the text that the template puts after a turn, cut out of a short conversation.

What the template's source spells is a control token, and nothing else is: it is rendered with its control tokens marked
(`markup`), so a file that contains `<|im_end|>` ends no turn, and a parameter called `think` opens no thought.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from trainer.chat.functions import Functions
from trainer.chat.markup import each_text
from trainer.chat.reader import CLOSED, END, OPENED, START, ChatReader
from trainer.chat.syntax import Hermes
from trainer.data import Message, Tool
from trainer.errors import UserError

TURN = "(a turn)"
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
        self._learn_template()

    # Detecting the kind of template

    def _learn_template(self) -> None:
        """Learn the template's format from short conversations."""
        if not self.tokenizer.chat_template:
            raise _unknown("there is none")
        call = {"type": "function", "function": {"name": "probe", "arguments": {"a": "x"}}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            opening = self.markup.spell(self._text_of([USER])).rpartition(START)[2]
            called = self.markup.spell(self._text_of([USER, calling], [PROBE], opened=False)).rpartition(START)[2]
            seen: Message = {"role": "tool", "content": "seen"}
            observed = self._after_turn([seen])
            self._check_marks([USER, calling, seen])
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

    def _check_marks(self, messages: list[Message]) -> None:
        """Refuse a template that puts control tokens together out of parts: they could not be told from data."""
        shown = [_with_objects(message) for message in messages]
        options = {"add_generation_prompt": True, "return_dict": False, **self.options}
        if self.markup.encode(self._text_of(messages, [PROBE])) != self.tokenizer.apply_chat_template(
            shown, tools=[PROBE], **options
        ):
            raise UserError("the control tokens of its output are not all spelled in its source")

    # Messages to tokens

    def prompt(self, messages: list[Message], tools: list[Tool], reference: str = "") -> list[int]:
        listed = [tool for tool in tools if not tool.get("unlisted")]
        self._schemas.update({t["function"]["name"]: t["function"].get("parameters") or {} for t in tools})
        return self.markup.encode(self._text_of(_with_reference(messages, reference), listed))

    def observation(self, messages: list[Message]) -> list[int]:
        return self.markup.encode(self._after_turn(messages))

    def turn(self, message: Message) -> list[int]:
        """An assistant message as the policy would sample it, stop token included: for demonstrations."""
        before, whole = self._text_of([USER]), self._text_of([USER, message], opened=False)
        assert whole.startswith(before), "the template does not open a turn as it writes one"
        end = self.markup.mark(END)
        return self.markup.encode(whole[len(before) :].partition(end)[0] + end)

    def _after_turn(self, messages: list[Message]) -> str:
        """What the template writes between the end of a turn and the opening of the next."""
        turn = {"role": "assistant", "content": TURN}
        return self._text_of([USER, turn, *messages]).partition(TURN + self.markup.mark(END))[2]

    def _text_of(self, messages: list[Message], tools: list[Tool] | None = None, opened: bool = True) -> str:
        """The template's text, marked."""
        from jinja2 import TemplateError

        data, mark = self.markup.data, self.markup.mark
        try:
            text: str = self.tokenizer.apply_chat_template(
                data([_with_objects(message) for message in messages]),
                tools=data(tools) or None,
                chat_template=mark(self.tokenizer.get_chat_template(tools=tools or None)),
                add_generation_prompt=opened,
                tokenize=False,
                **each_text(mark, self.tokenizer.special_tokens_map),  # a template may write {{ eos_token }}
                **self.options,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"model.renderer: the chat template refuses a conversation ({error})") from error
        return text


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


def _unknown(why: str) -> UserError:
    return UserError(
        f"model.renderer: the tokenizer's chat template is none that `template` knows ({why}); "
        "use --model.renderer chatml, or give the folder a ChatML template"
    )
