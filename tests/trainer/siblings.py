"""Groups of hand-made siblings for the tests of the credit references."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trainer.data import Group, Message, Rollout, Task

TOOLS = ["look", "ask", "act", "shout", "wait"]


def task(scenario: str = "s1", instruction: str = "book the room", **data: Any) -> Task:
    return Task(f"{scenario}_1", "toy", "train", scenario, "state_changing", instruction, data)


def call(name: str, arguments: Any = None, number: int = 0) -> Message:
    function = {"name": name, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments or {})}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}],
    }


def seen(content: str, number: int = 0) -> Message:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": content}


def rollout(names: Sequence[str], reward: float, *, of: Task | None = None, answer: str | None = "done") -> Rollout:
    """A rollout that calls `names` in turn and then answers (or, with None, is cut off)."""
    messages = [m for i, name in enumerate(names) for m in (call(name, {"who": "dana"}, i), seen('{"ok": "yes"}', i))]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in TOOLS]
    own = of or task()
    prompt = [{"role": "user", "content": own.instruction}]
    made = Rollout(own, prompt, tools, [1, 2, 3], messages=messages, reward=reward, success=reward > 0)
    made.details = {"label": "missing_check:look", "gold": "HIDDEN"}
    return made


def group(*attempts: tuple[Sequence[str], float], of: Task | None = None) -> Group:
    own = of or task()
    return Group(own, [rollout(names, reward, of=own) for names, reward in attempts])


def with_messages(*traces: tuple[list[Message], float], of: Task | None = None) -> Group:
    """A group of given transcripts."""
    made = group(*[([], reward) for _, reward in traces], of=of)
    for one, (messages, _) in zip(made.rollouts, traces):
        one.messages = messages
    return made


class ToySuite:
    """A suite that only has answer literals."""

    name = "toy"
    splits = {"train": 1}

    def __init__(self, literals: Sequence[str] = ()) -> None:
        self.literals = list(literals)

    def tasks(self, split: str) -> list[Task]:
        return [task()]

    def make(self) -> Any:
        raise NotImplementedError

    def answer_literals(self, task: Task) -> list[str]:
        return self.literals

    def refusal(self) -> Message:
        return {"role": "assistant", "content": "sorry"}
