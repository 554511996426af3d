"""Evaluates a policy on a split: tasks and scenarios solved, compared with the score of doing nothing.

Names are `eval/<env>/<what>`; `trainer.evaluation.estimates` defines the figures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainer import randomness
from trainer.concurrency import run_together
from trainer.data import BugReport, Rollout, Sampling, Task
from trainer.evaluation.estimates import summarise
from trainer.protocols import Engine, Renderer, Suite
from trainer.rollout.episode import Guarded, RolloutSetup, close_environment, make_environment, wait_until_open
from trainer.rollout.rewards import Grading, load
from trainer.rollout.siblings import EnvironmentMonitor, GroupSampler

if TYPE_CHECKING:
    from trainer.config import Config

log = logging.getLogger(__name__)
EVALUATION_SEED = 7_919  # added to the run's seed: evaluation and training never draw the same numbers
ALONE = Grading(relative=False)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: the figures under their full names, and what they were made from."""

    metrics: dict[str, float]
    rollouts: list[Rollout]
    refusals: dict[str, float]  # task id -> 1 where the polite refuser succeeds, else 0
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

    `advance(1)` is called when a task is finished. All randomness is put back afterwards, so that a run trains the
    same whether it is evaluated or not.

    Raises:
        EnvironmentLost: every attempt broke: there is nothing to report.
    """
    tasks = suite.tasks(split or config.env.eval_split)
    sampling = Sampling(config.eval_temperature, config.top_p, config.max_completion_length)
    grading = replace(load(config.rewards, config.success_threshold), relative=False)
    setup = RolloutSetup(engine, suite, renderer, sampling, config.env, config.model.max_length, grading)
    sample = GroupSampler(setup, config.eval_samples, advance)
    generator = getattr(engine, "generator", None)  # a server has none
    with randomness.separate(config.seed + EVALUATION_SEED, generator):
        groups = await run_together(sample(task) for task in tasks)
        refusals = await refuse(suite, tasks, config.env.timeout, config.env.max_turns, grading)
    EnvironmentMonitor(len(tasks)).observe(groups)
    sample.check_that_some_fit()
    if too_long := sample.too_long:
        log.warning("%d of %d tasks are left out, being too long: %s", len(too_long), len(tasks), too_long[0])
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    figures = summarise(tasks, rollouts, refusals, samples=config.eval_samples)
    bugs = [bug for group in groups for bug in group.bugs]
    figures["errored"] = float(sum(group.broken for group in groups))
    figures["bugs"] = float(len(bugs))
    figures["too_long"] = float(len(too_long))
    return Evaluation({f"eval/{suite.name}/{name}": v for name, v in figures.items()}, rollouts, refusals, bugs)


async def refuse(
    suite: Suite, tasks: Sequence[Task], timeout: float, max_turns: int = 16, grading: Grading = ALONE
) -> dict[str, float]:
    """Task id -> success (1 or 0) of refusing politely until the episode is over, or `max_turns` times.

    Tasks whose environment broke, or took longer than `timeout` seconds for a call, are left out.
    """

    async def one(task: Task) -> float | None:
        try:
            return await refuse_one(suite, task, timeout, max_turns, grading)
        except Exception as error:  # the environment's fault, as in an episode: the task is left out, not scored 0
            log.warning("the refuser's attempt at %s broke: %r", task.id, error)
            return None

    found = await run_together(one(task) for task in tasks)
    return {task.id: success for task, success in zip(tasks, found) if success is not None}


async def refuse_one(suite: Suite, task: Task, timeout: float, max_turns: int = 16, grading: Grading = ALONE) -> float:
    """Success of refusing at one task, 1 or 0, graded as a rollout is; a fault is an `EnvironmentBroken`."""
    environment = make_environment(suite, timeout)
    try:
        await wait_until_open(environment)
        guarded = Guarded(environment, timeout)
        messages, tools = await guarded.reset(task)
        rollout = Rollout(task, messages, tools, [])
        for _ in range(max_turns):
            observed, done = await guarded.step(suite.refusal())
            rollout.messages += [suite.refusal(), *observed]
            if done:
                break
        await grading.grade(rollout, await guarded.outcome(), timeout)
        grading.judge([rollout])
        return float(bool(rollout.success))
    finally:
        await close_environment(environment, timeout)
