"""Demonstrations: the gold calls of a conversation, carried out, as the messages of a flawless assistant."""

from __future__ import annotations

import json
from collections.abc import Iterable

from trainer.data import Message, Task, Tool
from trainer.envs.bfcl.calls import Call
from trainer.envs.bfcl.suite import BfclEnvironment
from trainer.envs.bfcl.world import World

DONE = "Done."
MISSING = "I cannot do that yet: a tool or a value is missing."


async def demonstrate(task: Task) -> tuple[list[Message], list[Tool], float]:
    """Play the gold calls of `task`, one per message, through its environment.

    Returns:
        The whole transcript from the system message on, the tools, and the verifier's reward (1.0, or the benchmark
        contradicts itself).
    """
    entry, turns = task.data["entry"], task.data["turns"]
    environment, naming = BfclEnvironment(), World(entry)
    messages, tools = await environment.reset(task)
    transcript = list(messages)
    for gold in entry.gold[:turns]:
        for message in [*gold_messages(gold, naming), {"role": "assistant", "content": DONE if gold else MISSING}]:
            new, _ = await environment.step(message)
            transcript += [message, *new]
    return transcript, tools, (await environment.outcome()).reward


def gold_messages(calls: Iterable[Call], naming: World) -> list[Message]:
    """Gold calls as assistant messages; arguments given by position get their names."""
    return [assistant_call(naming.bind(call)) for call in calls]


def assistant_call(call: Call) -> Message:
    """One call as an assistant's message."""
    function = {"name": call.name, "arguments": json.dumps(dict(call.named), ensure_ascii=False)}
    tool_call = {"id": "call_0", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [tool_call]}
