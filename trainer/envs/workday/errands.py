"""A task's errands, the world they start in, and the plan that does them all."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.envs.workday.templates import TEMPLATES, Params, Plan, Template
from trainer.envs.workday.world import State, build


@dataclass(frozen=True)
class Part:
    """One errand of a task: the template, which condition holds (None: an ordinary day), and whom it is about."""

    template: str
    condition: int | None
    phrase: int
    params: Params

    @property
    def kind(self) -> Template:
        return TEMPLATES[self.template]

    def instruction(self) -> str:
        return self.kind.phrases[self.phrase].format(**self.params)


def initial_state(data: Mapping[str, Any]) -> State:
    """Return the world as the task finds it."""
    state = build(random.Random(data["seed"]), data["people"], data["topics"])
    for part in data["parts"]:
        part.kind.usual(state, part.params)
    for part in data["parts"]:
        if part.condition is not None:
            part.kind.conditions[part.condition](state, part.params)
    return state


def plan(data: Mapping[str, Any]) -> Plan:
    """Return the gold plan: each errand in turn; the last one's answer is the task's."""
    answer = ""
    for part in data["parts"]:
        answer = yield from part.kind.plan(part.params)
    return answer
