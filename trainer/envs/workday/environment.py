"""The workday suite: one live world an episode."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainer.data import Message, Outcome, Task, Tool
from trainer.envs.workday import tasks as catalogue
from trainer.envs.workday.errands import initial_state
from trainer.envs.workday.gold import label, passes, solve
from trainer.envs.workday.world import act, schemas
from trainer.errors import UserError


class WorkdayEnvironment:
    """One episode. A policy's mistake is an observation; nothing here can break but our own code."""

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        self.task = task
        self.state = initial_state(task.data)
        self.trace: list[tuple[str, dict[str, Any]]] = []  # every call, for the label
        self.done: list[tuple[str, dict[str, Any]]] = []  # those that took effect
        self.answer: str | None = None  # None: the episode has not ended in words
        return [{"role": "user", "content": task.instruction}], schemas()

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        calls = message.get("tool_calls") or []
        if not calls:
            self.answer = message.get("content") or ""
            return [], True
        return [self._call(call) for call in calls], False

    def _call(self, call: Mapping[str, Any]) -> Message:
        function = call["function"]
        arguments = json.loads(function["arguments"])
        seen = act(self.state, function["name"], arguments)
        self.trace.append((function["name"], arguments))
        if "error" not in seen:
            self.done.append((function["name"], arguments))
        return {"role": "tool", "tool_call_id": call["id"], "name": function["name"], "content": json.dumps(seen)}

    async def outcome(self) -> Outcome:
        gold = solve(self.task.data)
        if self.answer is None:
            return Outcome(0.0, {"label": "unfinished"}, success=False, reason="unfinished")
        if passes(self.task.data, gold, self.state, self.done, self.answer):
            return Outcome(1.0, {"label": "passed"}, success=True)
        mistake = label(gold, self.trace)
        return Outcome(0.0, {"label": mistake}, success=False, reason=mistake)

    async def close(self) -> None: ...


class WorkdaySuite:
    """Tasks by split, and worlds to do them in."""

    name = "workday"
    splits: Mapping[str, int] = catalogue.SPLITS

    def tasks(self, split: str) -> list[Task]:
        if split not in self.splits:
            raise UserError(f"env split: workday has no split {split!r}; there are {', '.join(self.splits)}")
        return catalogue.tasks(split)

    def make(self) -> WorkdayEnvironment:
        return WorkdayEnvironment()

    def answer_literals(self, task: Task) -> list[str]:
        return [solve(task.data).answer.split()[-1]] if task.task_class == "information" else []

    def refusal(self) -> Message:
        return {"role": "assistant", "content": "sorry"}
