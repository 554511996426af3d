"""`python -m trainer.envs.workday.selfcheck`: replay gold, nothing-done and near-misses for every task of every split.

Gold must always pass. Doing nothing must always fail, no-action tasks aside (and there it must pass). Near-misses must
always fail: a decisive check skipped, a write left out, a write with one argument changed, a write too many, another
answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.envs.workday import tasks as catalogue
from trainer.envs.workday.errands import initial_state, plan
from trainer.envs.workday.gold import Solution, follow, passes, solve
from trainer.envs.workday.templates import Call
from trainer.envs.workday.world import AMOUNTS, DAYS, FILES, HOURS, State, act
from trainer.types import Task


def replay(task: Task, calls: list[Call]) -> State:
    state = initial_state(task.data)
    for call in calls:
        act(state, call.name, call.arguments)
    return state


def other_value(key: str, value: Any, task: Task) -> Any:
    """Return another valid value for an argument."""
    pools: dict[str, list[Any]] = {"day": DAYS, "hour": HOURS, "amount": AMOUNTS, "file": FILES}
    pools |= {"topic": task.data["topics"], "subject": ["hello", "other"], "text": ["hello", "other"]}
    pool = pools.get(key, task.data["people"])
    return next(candidate for candidate in pool if candidate != value)


def near_misses(task: Task, gold: Solution) -> Iterator[tuple[str, State, str]]:
    """Yield (kind, final state, answer) of runs that are almost right."""
    for skipped in (step for step in gold.steps if step.decisive):
        state = initial_state(task.data)
        _, answer = follow(
            plan(task.data),
            state,
            lambda step, skipped=skipped: step.call != skipped.call,  # type: ignore[misc]
        )
        yield "check skipped", state, answer
    for i, call in enumerate(gold.writes):
        yield "write left out", replay(task, gold.writes[:i] + gold.writes[i + 1 :]), gold.answer
        for key, value in call.arguments.items():
            changed = Call(call.name, {**call.arguments, key: other_value(key, value, task)}, "write")
            yield "argument changed", replay(task, [*gold.writes[:i], changed, *gold.writes[i + 1 :]]), gold.answer
    stray = Call("mail_send", {"to": "team", "subject": "stray"}, "write")
    yield "write too many", replay(task, [*gold.writes, stray]), gold.answer
    if task.task_class == "information":
        yield "other answer", replay(task, gold.writes), "answer sorry"


def check_split(split: str) -> tuple[Counter[str], list[str]]:
    """Return the counts of `split` and a line for everything that is not as it must be."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []

    def expect(kind: str, task: Task, passed: bool, wanted: bool) -> None:
        counts[f"{kind}: {'passed' if passed else 'failed'}"] += 1
        if passed != wanted:
            wrong.append(f"{task.id}: {kind} {'passed' if passed else 'failed'}")

    for task in catalogue.tasks(split):
        gold = solve(task.data)
        counts[task.task_class] += 1
        counts["calls"] += len(gold.steps)
        expect("gold", task, passes(task.data, gold, replay(task, [s.call for s in gold.steps]), gold.answer), True)
        idle = passes(task.data, gold, initial_state(task.data), "sorry")
        expect("nothing done", task, idle, task.task_class == "no_action")
        for kind, state, answer in near_misses(task, gold):
            expect(kind, task, passes(task.data, gold, state, answer), False)
    return counts, wrong


def main() -> int:
    table = Table(title="workday self-check: passed / replayed (gold must all pass, near-misses must all fail)")
    kinds = [
        "gold",
        "nothing done",
        "check skipped",
        "write left out",
        "argument changed",
        "write too many",
        "other answer",
    ]
    for column in ["split", "tasks", "state / info / none", "calls", *kinds]:
        table.add_column(column, justify="right")
    failures: list[str] = []
    for split, size in catalogue.SPLITS.items():
        counts, wrong = check_split(split)
        failures += wrong
        classes = " / ".join(str(counts[c]) for c in ("state_changing", "information", "no_action"))
        cells = [f"{counts[f'{k}: passed']}/{counts[f'{k}: passed'] + counts[f'{k}: failed']}" for k in kinds]
        table.add_row(split, str(size), classes, f"{counts['calls'] / size:.1f}", *cells)
    console = Console(width=150)
    console.print(table)
    for line in failures[:20]:
        console.print(line)
    console.print("all as it must be" if not failures else f"{len(failures)} replays are not as they must be")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
