"""The task that both trainers get: an office errand, of which only the first tool call counts.

Multi-turn rollouts with tools are driven differently by every trainer; one assistant turn is the same thing to all. The
reward is 1 if the turn's first call has the name of the gold plan's first call.
"""

from __future__ import annotations

from collections.abc import Mapping

from trainer import envs
from trainer.data import Message, Outcome, Task, Tool
from trainer.envs.workday.gold import solve


def gold_name(task: Task) -> str:
    """The tool that the gold plan calls first; "" if it just answers."""
    steps = solve(task.data).steps
    return steps[0].call.name if steps else ""


def reward(message: Message, wanted: str) -> float:
    calls = message.get("tool_calls") or []
    return float((calls[0]["function"]["name"] if calls else "") == wanted)


class FirstCall:
    """One turn of a workday episode."""

    def __init__(self) -> None:
        self.inner = envs.load("workday").make()
        self.score = 0.0

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        self.wanted = gold_name(task)
        return await self.inner.reset(task)

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        self.score = reward(message, self.wanted)
        return [], True

    async def outcome(self) -> Outcome:
        return Outcome(self.score)

    async def close(self) -> None:
        await self.inner.close()


class FirstCallSuite:
    """Workday's tasks, ended after the first turn."""

    name = "first_call"

    def __init__(self) -> None:
        self.inner = envs.load("workday")
        self.splits: Mapping[str, int] = self.inner.splits

    def tasks(self, split: str) -> list[Task]:
        return self.inner.tasks(split)

    def make(self) -> FirstCall:
        return FirstCall()

    def answer_literals(self, task: Task) -> list[str]:
        return self.inner.answer_literals(task)

    def refusal(self) -> Message:
        return self.inner.refusal()
