"""The `check` command: tests the installation and a config before hours are spent, and estimates what the run needs.

Checks continue after a failure, so that all mistakes are reported at once; a check that depends on a failed one is
skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from trainer.console import VisibleConsole
from trainer.errors import ReportedError
from trainer.preflight import run_costs
from trainer.preflight.checks import CHECKS
from trainer.preflight.probe import Probe, Skipped

if TYPE_CHECKING:
    from trainer.config import Config

P = TypeVar("P")  # what a check is given
STYLES = {"ok": "green", "FAIL": "bold red", "skip": "yellow", "warn": "yellow"}


def check(config: Config, mistakes: Sequence[str] = ()) -> bool:
    """Run every check, print a line for each thing found or missing; return whether all is well.

    `mistakes` are those of the config itself, which holds defaults in their places.
    """
    console = VisibleConsole(highlight=False, soft_wrap=True)  # a command to copy must stay on its line
    probe, missing = Probe(config), len(mistakes)
    for line in mistakes:
        print_line(console, "FAIL", "config", line)
    for name, run in CHECKS.items():
        with console.status(f"check {name}"):
            mark, lines = attempt(run, probe)
        missing += len(lines) if mark == "FAIL" else 0
        for line in filter(None, lines):
            print_line(console, mark, name, line)
        while probe.warnings:
            print_line(console, "warn", name, probe.warnings.pop(0))
    if probe.facts and probe.memory:
        console.print("\nwhat the run needs, at most (docs/paper.md says how this is known)", markup=False)
        tasks = probe.suite.splits.get(config.env.eval_split, 0) if probe.suite else 0
        for line in run_costs.report(config, probe.facts, probe.memory, tasks):
            console.print(line, markup=False)
    if missing:
        what = "the line" if missing == 1 else f"the {missing} lines"
        console.print(f"\nnot ready: see {what} marked FAIL", markup=False)
    else:
        console.print("\nready to train", markup=False)
    return not missing


def attempt(run: Callable[[P], str], probe: P) -> tuple[str, list[str]]:
    """Run one check; return its mark and its lines."""
    try:
        return "ok", [run(probe)]
    except Skipped as reason:
        return "skip", [str(reason)]
    except ReportedError as error:
        return "FAIL", error.lines
    except Exception as error:  # the lines are the report, whatever broke
        return "FAIL", [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]


def print_line(console: VisibleConsole, mark: str, name: str, line: str) -> None:
    """One line of a report: ok, FAIL, skip or warn, the check, and what it found."""
    console.print(f"[{STYLES[mark]}]{mark:<4}[/]  {name:<14}  ", end="")
    console.print(line, markup=False)
