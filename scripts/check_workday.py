"""`python -m scripts.check_workday`: replay gold, nothing-done and near-misses for every task of every split.

Gold must always pass. Doing nothing must always fail, no-action tasks aside (and there it must pass). Near-misses must
always fail: a decisive check skipped, a write left out, a write with one argument changed, a wrong write before
the right one, a write too many, another answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.data import Task
from trainer.envs.workday import tasks as catalogue
from trainer.envs.workday.errands import initial_state, plan
from trainer.envs.workday.gold import Solution, follow, passes, solve
from trainer.envs.workday.templates import Call
from trainer.envs.workday.world import AMOUNTS, DAYS, HOURS, State, act


def tried(task: Task, gold: Solution, calls: list[Call], answer: str) -> bool:
    """Make `calls` in a fresh world and say whether the verifier lets it pass."""
    state, done = make(task, calls)
    return passes(task.data, gold, state, [(call.name, call.arguments) for call in done], answer)


def make(task: Task, calls: list[Call]) -> tuple[State, list[Call]]:
    """Make `calls` in a fresh world; give its state and the calls that took effect."""
    state = initial_state(task.data)
    return state, [call for call in calls if "error" not in act(state, call.name, call.arguments)]


def other_value(key: str, value: Any, task: Task) -> Any:
    """Return another value for an argument, one with which the tool works."""
    topics = task.data["topics"]
    pools: dict[str, list[Any]] = {"day": DAYS, "hour": HOURS, "amount": AMOUNTS, "topic": topics}
    pools |= {
        "file": list(initial_state(task.data)["files"]),
        "subject": ["hello", "other"],
        "text": ["hello", "other"],
    }
    pool = pools.get(key, task.data["people"])
    return next(candidate for candidate in pool if candidate != value)


def near_misses(task: Task, gold: Solution) -> Iterator[tuple[str, list[Call], str]]:
    """Yield (kind, calls, answer) of runs that are almost right."""
    for skipped in (step for step in gold.steps if step.decisive):
        steps, answer = follow(
            plan(task.data),
            initial_state(task.data),
            lambda step, skipped=skipped: step.call != skipped.call,  # type: ignore[misc]
        )
        yield "check skipped", [step.call for step in steps], answer
    for i, call in enumerate(gold.writes):
        before, after = gold.writes[:i], gold.writes[i + 1 :]
        yield "write left out", [*before, *after], gold.answer
        for key, value in call.arguments.items():
            changed = Call(call.name, {**call.arguments, key: other_value(key, value, task)}, "write")
            yield "argument changed", [*before, changed, *after], gold.answer
            # In a chain the same call may be right elsewhere, or come too late to do anything.
            if changed not in gold.writes and changed in make(task, [*before, changed])[1]:
                yield "wrong write first", [*before, changed, call, *after], gold.answer
    stray = Call("mail_send", {"to": "team", "subject": "stray"}, "write")
    yield "write too many", [*gold.writes, stray], gold.answer
    if task.task_class == "information":
        yield "other answer", gold.writes, "answer sorry"


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
        expect("gold", task, tried(task, gold, [step.call for step in gold.steps], gold.answer), True)
        idle = tried(task, gold, [], "sorry")
        expect("nothing done", task, idle, task.task_class == "no_action")
        for kind, calls, answer in near_misses(task, gold):
            expect(kind, task, tried(task, gold, calls, answer), False)
    return counts, wrong


def main() -> int:
    table = Table(title="workday self-check: passed / replayed (gold must all pass, near-misses must all fail)")
    kinds = [
        "gold",
        "nothing done",
        "check skipped",
        "write left out",
        "argument changed",
        "wrong write first",
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
