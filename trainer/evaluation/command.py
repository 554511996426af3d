"""The `eval` command: load a policy, evaluate it, print a table and write the result beside the run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trainer import engines, envs, files, randomness, stop_signals
from trainer.console import VisibleConsole
from trainer.errors import UserError
from trainer.evaluation.estimates import by_task
from trainer.evaluation.evaluate import Evaluation, evaluate
from trainer.learning import model as policy
from trainer.records import bug_reports, checkpoint
from trainer.terminal import say, visible

if TYPE_CHECKING:
    from trainer.config import Config


def run(config: Config, weights: Path | None = None) -> Evaluation:
    """The `eval` command: evaluate a checkpoint, or the model folder of the config; print and write the result."""
    randomness.seed_all(config.seed)
    suite = envs.load(config.env.name, **config.env.options)
    split = config.env.eval_split
    envs.check_split(suite, "eval_split", split)
    path = _target(config, weights)
    model, _, renderer = policy.load(config.model)
    if weights is not None:
        checkpoint.load(weights, model=model)
    engine = engines.make(config, model, renderer)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = VisibleConsole(highlight=False)
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"evaluate {split}", total=suite.splits[split])
        result = stop_signals.run(evaluate(engine, suite, renderer, config, advance=lambda n: progress.advance(bar, n)))
    source = str(weights or config.model.path)
    console.print(_table(result, suite.name, f"{source} on {suite.name}/{split}"))
    _write(path, result, config, source)
    bug_reports.append(path.parent, 0, result.bugs)
    say(f"written: {path}")
    return result


def _table(result: Evaluation, env: str, title: str) -> Any:
    table = Table("figure", "value", "95 % interval", title=visible(title), title_justify="left")
    figures = {name.removeprefix(f"eval/{env}/"): value for name, value in result.metrics.items()}
    for name, value in figures.items():
        if not name.endswith(("_low", "_high")):
            low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
            interval = "" if low is None or high is None else f"{low:.3f} - {high:.3f}"
            table.add_row(name, f"{value:.3f}".removesuffix(".000") if value > 1 else f"{value:.3f}", interval)
    return table


def _target(config: Config, weights: Path | None) -> Path:
    """The file that the result goes into, one for each split, weights and options; its folder can be written."""
    folder = config.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be a folder ({error.strerror}); choose another one") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"output_dir: {folder} cannot be written; choose another one")
    name = weights.name if weights else "base"
    return folder / f"eval_{config.env.eval_split}_{name}{_label(config.env.options)}.json"


def _label(options: Mapping[str, Any]) -> str:
    """Six letters that differ where the options differ (another user simulator is another benchmark), "" for none."""
    text = json.dumps(options, sort_keys=True, default=str).encode()
    return f"_{hashlib.sha256(text).hexdigest()[:6]}" if options else ""


def _write(path: Path, result: Evaluation, config: Config, source: str) -> None:
    """The figures, and each task's attempts, so that two runs can be compared task by task."""
    attempts = by_task(result.rollouts)
    tasks = {r.task.id: r.task for r in result.rollouts}
    record = {
        "env": config.env.name,
        "options": config.env.options,  # such as the user simulator; API keys are named there, never stored
        "split": config.env.eval_split,
        "weights": source,
        "samples": config.eval_samples,
        "temperature": config.eval_temperature,
        "metrics": {name: value if isfinite(value) else None for name, value in result.metrics.items()},
        "tasks": {
            name: {
                "scenario": task.scenario,
                "class": task.task_class,
                "successes": attempts[name],
                "rewards": [r.reward for r in result.rollouts if r.task.id == name],
                "refuser": result.refusals.get(name),
            }
            for name, task in tasks.items()
        },
    }
    files.write(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
