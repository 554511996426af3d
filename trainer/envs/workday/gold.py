"""Solving a task by its plan, verifying a final state, and labelling failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainer.envs.workday.errands import initial_state, plan
from trainer.envs.workday.templates import Call, Plan
from trainer.envs.workday.world import SPECS, State, act

Trace = Sequence[tuple[str, Mapping[str, Any]]]  # the calls that were made: name, arguments


@dataclass(frozen=True)
class Step:
    """One call of a plan and its observation; `decisive` if a check contradicts what a hurried worker assumes."""

    call: Call
    seen: dict[str, Any]

    @property
    def made(self) -> tuple[str, dict[str, Any]]:
        return self.call.name, self.call.arguments

    @property
    def decisive(self) -> bool:
        return self.call.kind == "check" and any(self.seen.get(k) != v for k, v in self.call.assume.items())


@dataclass(frozen=True)
class Solution:
    steps: list[Step]
    answer: str
    state: State

    @cached_property
    def writes(self) -> list[Call]:
        return [step.call for step in self.steps if SPECS[step.call.name].writes]


def follow(plan: Plan, state: State, sees: Callable[[Step], bool] = lambda step: True) -> tuple[list[Step], str]:
    """Run `plan` on `state` (changed in place).

    `sees(step)` is asked before every check; where it is False the check is skipped and the plan continues with what it
    assumes. Returns the steps that were taken and the final answer.
    """
    steps: list[Step] = []
    try:
        call = next(plan)
        while True:
            step = Step(call, act(state, call.name, call.arguments))
            if call.kind == "check" and not sees(step):
                call = plan.send(dict(call.assume))
                continue
            steps.append(step)
            call = plan.send(step.seen)
    except StopIteration as stop:
        return steps, str(stop.value)


def solve(data: Mapping[str, Any]) -> Solution:
    """Return the gold solution."""
    state = initial_state(data)
    steps, answer = follow(plan(data), state)
    return Solution(steps, answer, state)


def answered(answer: str, gold: str) -> bool:
    """Compare the last words: "answer 14" and "it is 14" say the same."""
    return answer.split()[-1:] == gold.split()[-1:]


def passes(data: Mapping[str, Any], gold: Solution, state: State, trace: Trace, answer: str) -> bool:
    """The verifier: the exact final state, no write but gold's, and, where something was asked, the answer.

    The second rule is for damage that the state no longer shows: a file shared with everybody and then deleted.
    """
    asks = any(part.kind.asks for part in data["parts"])
    wanted = [(call.name, call.arguments) for call in gold.writes]
    damage = any(SPECS[name].writes and (name, arguments) not in wanted for name, arguments in trace if name in SPECS)
    return state == gold.state and not damage and (not asks or answered(answer, gold.answer))


def label(gold: Solution, trace: Trace) -> str:
    """Name the first thing that went wrong in a failed episode.

    `missing_check:TOOL` a check that would have changed the course was never made; `wrong_argument:TOOL` the right tool
    with other arguments; `wrong_branch:TOOL` a needed call never made; `stray_write:TOOL`; `wrong_answer`.
    """
    made = [(name, dict(arguments)) for name, arguments in trace]
    names = {name for name, _ in made}
    for step in gold.steps:
        call = step.call
        if (call.name, call.arguments) in made:
            continue
        if step.decisive:
            return f"{'wrong_argument' if call.name in names else 'missing_check'}:{call.name}"
        if SPECS[call.name].writes:
            return f"{'wrong_argument' if call.name in names else 'wrong_branch'}:{call.name}"
    wanted = [(call.name, call.arguments) for call in gold.writes]
    for name, arguments in made:
        if name in SPECS and SPECS[name].writes:
            if (name, arguments) not in wanted:
                return f"stray_write:{name}"
            wanted.remove((name, arguments))
    return "wrong_answer"
