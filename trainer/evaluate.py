"""How good a policy is on a split: tasks and scenarios solved, with intervals, beside the score of doing nothing.

Names are `eval/<env>/<what>`. All estimates are unbiased whatever number of attempts a task has, so an attempt that an
environment broke is left out and never counts as a failure.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import comb, isfinite, prod
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.metrics import class_success, tool_metrics
from trainer.rollout import PromptTooLong, Pulse, opened, run_group, together
from trainer.types import Engine, Group, Renderer, Rollout, Sampling, Suite, Task, UserError

if TYPE_CHECKING:
    from trainer.config import Config

log = logging.getLogger(__name__)
EVALUATION_SEED = 7_919  # added to the run's seed: evaluation and training never draw the same numbers
N_BOOTSTRAP = 2_000
BOOTSTRAP_SEED = 20_260_612  # its own, so that an evaluation changes nothing else and two runs compare


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: the figures under their full names, and what they were made from."""

    metrics: dict[str, float]
    rollouts: list[Rollout]
    refusals: dict[str, float]  # task id -> reward of the polite refuser


async def evaluate(
    engine: Engine,
    suite: Suite,
    renderer: Renderer,
    config: Config,
    *,
    split: str | None = None,
    advance: Callable[[int], None] = lambda tasks: None,
) -> Evaluation:
    """Play `config.eval_samples` attempts at every task of `split` (default `env.eval_split`).

    `advance(1)` is called when a task is finished. The engine's own randomness is put back afterwards, so that a run
    trains the same whether it is evaluated or not.

    Raises:
        EnvironmentLost: every attempt broke: there is nothing to report.
    """
    tasks = suite.tasks(split or config.env.eval_split)
    sampling = Sampling(config.eval_temperature, config.top_p, config.max_completion_length)

    too_long: list[PromptTooLong] = []

    async def attempt(task: Task) -> tuple[Group, int]:
        length, samples = config.model.max_length, config.eval_samples
        try:
            return await run_group(engine, suite, renderer, task, sampling, config.env, length, samples)
        except PromptTooLong as error:
            too_long.append(error)
            return Group(task, []), 0
        finally:
            advance(1)

    with _own_randomness(engine, config.seed):
        results = await together(attempt(task) for task in tasks)
    Pulse(len(tasks)).feel(results)
    if too_long and len(too_long) == len(tasks):
        raise too_long[0]
    if too_long:
        log.warning("%d of %d tasks are left out, being too long: %s", len(too_long), len(tasks), too_long[0])
    rollouts = [rollout for group, _ in results for rollout in group.rollouts]
    refusals = await refuse(suite, tasks, config.env.timeout, config.env.max_turns)
    figures = summarise(tasks, rollouts, refusals, samples=config.eval_samples)
    figures["errored"] = float(sum(broken for _, broken in results))
    figures["too_long"] = float(len(too_long))
    return Evaluation({f"eval/{suite.name}/{name}": v for name, v in figures.items()}, rollouts, refusals)


def check_split(suite: Suite, key: str, split: str) -> None:
    """Refuse a split that the suite does not have, or that is empty."""
    if not suite.splits.get(split):
        raise UserError(f"env.{key}: {suite.name} has no tasks in {split!r}; its splits are {', '.join(suite.splits)}")


def run(config: Config, weights: Path | None = None) -> Evaluation:
    """The `eval` command: evaluate a checkpoint, or the model folder of the config; print and write the result."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from trainer import checkpoint, engines, envs
    from trainer import model as policy

    torch.manual_seed(config.seed)
    suite = envs.load(config.env.name, **config.env.options)
    split = config.env.eval_split
    check_split(suite, "eval_split", split)
    path = _target(config, weights)
    model, _, renderer = policy.load(config.model)
    if weights is not None:
        checkpoint.load(weights, model=model)
    engine = engines.make(config, model, renderer)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(highlight=False)
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"evaluate {split}", total=suite.splits[split])
        result = asyncio.run(evaluate(engine, suite, renderer, config, advance=lambda n: progress.advance(bar, n)))
    source = str(weights or config.model.path)
    console.print(_table(result, suite.name, f"{source} on {suite.name}/{split}"))
    _write(path, result, config, source)
    print(f"written: {path}")
    return result


def summarise(
    tasks: Sequence[Task], rollouts: Sequence[Rollout], refusals: Mapping[str, float], *, samples: int
) -> dict[str, float]:
    """Every figure of one evaluation.

    Args:
        tasks: the whole split.
        rollouts: finished attempts, in any order.
        refusals: task id -> reward of the polite refuser.
        samples: attempts that were asked for of each task.

    Returns:
        `tgc` share of tasks solved in one attempt, `sgc` share of scenarios of which one attempt at each task solves
        all, `pass@1` (= tgc), `pass^k` chance that k attempts at a task all succeed, `<x>_low` and `<x>_high` 95 %
        intervals (percentile bootstrap over scenarios: over tasks where each is its own), success by class, tool use,
        `refuser`; {} when no attempt finished.
    """
    if not rollouts:
        return {}
    attempts = by_task(rollouts)
    rate = {task: fmean(rewards) for task, rewards in attempts.items()}
    solved, whole = scenario_terms(tasks, rate)
    return {
        "tgc": ratio(solved),
        **_interval("tgc", solved),
        **({"sgc": ratio(whole), **_interval("sgc", whole)} if whole else {}),
        "pass@1": ratio(solved),
        **_interval("pass@1", solved),
        **_pass_hats(tasks, attempts, samples),
        **({"refuser": fmean(refusals.values())} if refusals else {}),
        "tasks": len(rate),
        "scenarios": len(whole),
        "mean_length": fmean(sum(r.generated) for r in rollouts),
        **tool_metrics(rollouts),
        **class_success(rollouts),
    }


def by_task(rollouts: Sequence[Rollout]) -> dict[str, list[float]]:
    """The rewards of each task's attempts."""
    attempts: dict[str, list[float]] = {}
    for r in rollouts:
        attempts.setdefault(r.task.id, []).append(r.reward)
    return attempts


Terms = list[tuple[float, float]]  # of each scenario: what it adds to a ratio's numerator and to its denominator


def scenario_terms(tasks: Sequence[Task], rate: Mapping[str, float]) -> tuple[Terms, Terms]:
    """The terms of TGC (tasks solved, tasks) and of SGC (chance that all are solved, 1) of each scenario.

    `rate` is the success of each task. A scenario of which a task has none is counted in TGC alone.
    """
    members: dict[str, list[float | None]] = {}
    for task in tasks:
        members.setdefault(task.scenario, []).append(rate.get(task.id))
    known = [[r for r in rates if r is not None] for rates in members.values()]
    solved = [(sum(rates), float(len(rates))) for rates in known if rates]
    whole = [(prod(some), 1.0) for some, rates in zip(known, members.values()) if len(some) == len(rates)]
    return solved, whole


def pass_hat(attempts: Mapping[str, Sequence[float]], k: int) -> dict[str, float]:
    """Task -> chance that k attempts at it all succeed, for the tasks that have k: C(solved, k) / C(attempts, k).

    The unbiased estimator of tau-bench (arXiv 2406.12045, section 3).
    """
    counts = {t: (sum(r == 1 for r in rewards), len(rewards)) for t, rewards in attempts.items() if len(rewards) >= k}
    return {task: comb(won, k) / comb(n, k) for task, (won, n) in counts.items()}


def _pass_hats(tasks: Sequence[Task], attempts: Mapping[str, Sequence[float]], samples: int) -> dict[str, float]:
    """pass^k with its interval, for 1 < k <= samples."""
    figures: dict[str, float] = {}
    for k in range(2, samples + 1):
        terms, _ = scenario_terms(tasks, pass_hat(attempts, k))
        if terms:
            figures |= {f"pass^{k}": ratio(terms), **_interval(f"pass^{k}", terms)}
    return figures


def bootstrap(terms: Terms, *, seed: int = BOOTSTRAP_SEED, draws: int = N_BOOTSTRAP) -> tuple[float, float]:
    """The 95 % percentile interval of a ratio, resampling scenarios: tasks of one scenario succeed together."""
    table = torch.tensor(terms, dtype=torch.float64)  # [S, 2]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(terms), (draws, len(terms)), generator=generator)
    sums: Tensor = table[chosen].sum(1)  # [draws, 2]
    low, high = torch.quantile(sums[:, 0] / sums[:, 1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _interval(name: str, terms: Terms) -> dict[str, float]:
    low, high = bootstrap(terms)
    return {f"{name}_low": low, f"{name}_high": high}


def ratio(terms: Terms) -> float:
    """The sum of the numerators over the sum of the denominators."""
    return sum(n for n, _ in terms) / sum(d for _, d in terms)


async def refuse(suite: Suite, tasks: Sequence[Task], timeout: float, max_turns: int = 16) -> dict[str, float]:
    """Task id -> what the environment pays for refusing politely until the episode is over, or `max_turns` times.

    Tasks whose environment broke, or took longer than `timeout` seconds for a call, are left out.
    """

    async def one(task: Task) -> float | None:
        try:
            return await refuse_one(suite, task, timeout, max_turns)
        except Exception as error:  # the environment's fault, as in an episode: the task is left out, not scored 0
            log.warning("the refuser's attempt at %s broke: %r", task.id, error)
            return None

    rewards = await together(one(task) for task in tasks)
    return {task.id: reward for task, reward in zip(tasks, rewards) if reward is not None}


async def refuse_one(suite: Suite, task: Task, timeout: float, max_turns: int = 16) -> float:
    """What refusing pays at one task; raises what the environment raises."""
    environment = suite.make()
    try:
        await opened(environment)
        await asyncio.wait_for(environment.reset(task), timeout)
        for _ in range(max_turns):
            _, done = await asyncio.wait_for(environment.step(suite.refusal()), timeout)
            if done:
                break
        return (await asyncio.wait_for(environment.outcome(), timeout)).reward
    finally:
        await environment.close()


@contextmanager
def _own_randomness(engine: Engine, seed: int) -> Iterator[None]:
    """Evaluate from a seed of its own, the same each time, and put the engine's generator back."""
    generator: torch.Generator | None = getattr(engine, "generator", None)
    if generator is None:
        yield
        return
    state = generator.get_state()
    generator.manual_seed(seed + EVALUATION_SEED)
    try:
        yield
    finally:
        generator.set_state(state)


def _table(result: Evaluation, env: str, title: str) -> Any:
    from rich.table import Table

    table = Table("figure", "value", "95 % interval", title=title, title_justify="left")
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
    """Six letters that differ where the options differ (another customer is another benchmark); none for none."""
    said = json.dumps(options, sort_keys=True, default=str).encode()
    return f"_{hashlib.sha256(said).hexdigest()[:6]}" if options else ""


def _write(path: Path, result: Evaluation, config: Config, source: str) -> None:
    """The figures, and each task's attempts, so that two runs can be compared task by task."""
    attempts = by_task(result.rollouts)
    tasks = {r.task.id: r.task for r in result.rollouts}
    record = {
        "env": config.env.name,
        "options": config.env.options,  # who played the customer, say; keys are named there, never given
        "split": config.env.eval_split,
        "weights": source,
        "samples": config.eval_samples,
        "temperature": config.eval_temperature,
        "metrics": {name: value if isfinite(value) else None for name, value in result.metrics.items()},
        "tasks": {
            name: {
                "scenario": task.scenario,
                "class": task.task_class,
                "rewards": attempts[name],
                "refuser": result.refusals.get(name),
            }
            for name, task in tasks.items()
        },
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
