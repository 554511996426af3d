"""Python functions with type hints as the tools of an episode, in OpenAI's format.

The schema comes from `transformers.utils.get_json_schema`: type hints, and a docstring in Google's style with a line
for each argument.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from transformers.utils import get_json_schema

from trainer.data import Message, Tool

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


class Toolbox:
    """The tools of one episode: functions or bound methods, plain or asynchronous.

    A plain function runs in the event loop, so it must be quick: one that waits is an `async def`, and blocking work in
    it goes through `await asyncio.to_thread(...)`. The policy's mistakes are answers: an unknown tool, missing,
    unknown or mistyped arguments, and whatever a function raises as `ValueError`. Any other exception is a fault of the
    environment, and ends the episode without a score.
    """

    def __init__(self, *functions: Callable[..., Any]) -> None:
        self._functions = {function.__name__: function for function in functions}
        self.schemas: list[Tool] = [get_json_schema(function) for function in functions]
        self._parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in self.schemas}

    async def answer(self, message: Message) -> list[Message]:
        """Run the calls of an assistant's message in order; return the messages that answer them."""
        return [
            {
                "role": "tool",
                "tool_call_id": call.get("id", ""),
                "name": call["function"]["name"],
                "content": await self._run(call["function"]["name"], call["function"]["arguments"]),
            }
            for call in message.get("tool_calls") or []
        ]

    async def _run(self, name: str, text: str) -> str:
        arguments = json.loads(text)
        if problem := self._problem(name, arguments):
            return json.dumps({"error": problem}, ensure_ascii=False)
        try:
            result = self._functions[name](**arguments)
            if inspect.isawaitable(result):
                result = await result
        except ValueError as error:
            result = {"error": str(error)}
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)

    def _problem(self, name: str, arguments: Any) -> str:
        """What is wrong with a call; "" for nothing."""
        if name not in self._functions:
            return f"unknown tool {name}"
        if not isinstance(arguments, dict):
            return "arguments must be an object"
        schema = self._parameters[name]
        for argument, value in arguments.items():
            if argument not in schema["properties"]:
                return f"unknown argument {argument}"
            wanted = schema["properties"][argument].get("type")
            if isinstance(wanted, str) and not _is(value, wanted):
                return f"{argument} must be {wanted}"
        missing = [argument for argument in schema.get("required", []) if argument not in arguments]
        return f"missing argument {missing[0]}" if missing else ""


def _is(value: Any, wanted: str) -> bool:
    if isinstance(value, bool):
        return wanted == "boolean"
    return isinstance(value, _TYPES.get(wanted, (object,)))


def call(name: str, /, **arguments: Any) -> Message:
    """The assistant's message that calls one tool: for `gold`, and for tests."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
    }


def say(text: str) -> Message:
    """The assistant's message that says something and calls nothing."""
    return {"role": "assistant", "content": text}
