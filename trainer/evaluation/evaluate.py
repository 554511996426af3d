"""Evaluates a policy on a split: tasks and scenarios solved, compared with the score of doing nothing.

Names are `eval/<env>/<what>`; `trainer.evaluation.estimates` defines the figures.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainer.concurrency import run_together
from trainer.data import BugReport, Rollout, Sampling, Task
from trainer.evaluation.estimates import summarise
from trainer.protocols import Engine, Renderer, Suite
from trainer.rollout.episode import RolloutSetup, wait_until_open
from trainer.rollout.siblings import EnvironmentMonitor, GroupSampler

if TYPE_CHECKING:
    from trainer.config import Config

log = logging.getLogger(__name__)
EVALUATION_SEED = 7_919  # added to the run's seed: evaluation and training never draw the same numbers


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: the figures under their full names, and what they were made from."""

    metrics: dict[str, float]
    rollouts: list[Rollout]
    refusals: dict[str, float]  # task id -> reward of the polite refuser
    bugs: list[BugReport]  # of the errored attempts, those that a fault in code broke


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
    setup = RolloutSetup(engine, suite, renderer, sampling, config.env, config.model.max_length)
    sample = GroupSampler(setup, config.eval_samples, advance)
    with _separate_randomness(engine, config.seed):
        groups = await run_together(sample(task) for task in tasks)
    EnvironmentMonitor(len(tasks)).observe(groups)
    sample.check_that_some_fit()
    if too_long := sample.too_long:
        log.warning("%d of %d tasks are left out, being too long: %s", len(too_long), len(tasks), too_long[0])
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    refusals = await refuse(suite, tasks, config.env.timeout, config.env.max_turns)
    figures = summarise(tasks, rollouts, refusals, samples=config.eval_samples)
    bugs = [bug for group in groups for bug in group.bugs]
    figures["errored"] = float(sum(group.broken for group in groups))
    figures["bugs"] = float(len(bugs))
    figures["too_long"] = float(len(too_long))
    return Evaluation({f"eval/{suite.name}/{name}": v for name, v in figures.items()}, rollouts, refusals, bugs)


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

    rewards = await run_together(one(task) for task in tasks)
    return {task.id: reward for task, reward in zip(tasks, rewards) if reward is not None}


async def refuse_one(suite: Suite, task: Task, timeout: float, max_turns: int = 16) -> float:
    """What refusing pays at one task; raises what the environment raises."""
    environment = suite.make()
    try:
        await wait_until_open(environment)
        await asyncio.wait_for(environment.reset(task), timeout)
        for _ in range(max_turns):
            _, done = await asyncio.wait_for(environment.step(suite.refusal()), timeout)
            if done:
                break
        return (await asyncio.wait_for(environment.outcome(), timeout)).reward
    finally:
        await environment.close()


@contextmanager
def _separate_randomness(engine: Engine, seed: int) -> Iterator[None]:
    """Evaluate from a separate seed, the same each time, and restore the engine's generator afterwards."""
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
