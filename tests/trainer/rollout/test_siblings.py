"""Groups of siblings, and an environment that is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.trainer import toy
from tests.trainer.rollout.test_episode import RENDERER, Script, setup
from trainer.data import Group, Rollout
from trainer.engines.hf import HFEngine
from trainer.errors import EnvironmentLost
from trainer.learning.update import check_mask
from trainer.rollout.siblings import EnvironmentMonitor, run_group


def play_group(engine: Any, suite: toy.ParitySuite, n: int = 4, **env: Any) -> Group:
    return asyncio.run(run_group(setup(engine, suite, **env), suite.tasks("train")[0], n))


def groups(*tries: tuple[int, int, int]) -> list[Group]:
    """Groups as (number of the task, whole rollouts, broken ones)."""
    tasks = toy.ParitySuite().tasks("train")
    return [
        Group(tasks[i], [Rollout(tasks[i], [], [], [1])] * n, broken=bad, problem=f"why {i}") for i, n, bad in tries
    ]


def test_an_environment_is_gone_when_two_tasks_in_a_row_have_no_whole_rollout() -> None:
    monitor = EnvironmentMonitor(6)
    monitor.observe(groups((0, 0, 4)))
    monitor.observe(groups((0, 0, 4)))  # the same task again: it may be what is broken
    monitor.observe(groups((1, 0, 0)))  # too long to play, and not broken
    monitor.observe(groups((2, 3, 1), (3, 0, 4)))
    monitor.observe(groups((4, 0, 4)))
    with pytest.raises(EnvironmentLost, match=r"every rollout broke, of 2 tasks.*: why \d\. Fix that"):
        monitor.observe(groups((5, 0, 4)))
    with pytest.raises(EnvironmentLost, match="of 1 tasks"):
        EnvironmentMonitor(1).observe(groups((0, 0, 2)))


def test_a_broken_sibling_is_retried_once() -> None:
    boom = ("step", RuntimeError("boom"))
    whole = play_group(Script(*["w1"] * 9), toy.ParitySuite(faults=[boom]))
    assert (len(whole.rollouts), whole.broken) == (4, 1)
    smaller = play_group(Script(*["w1"] * 9), toy.ParitySuite(faults=[boom] * 6))
    assert (len(smaller.rollouts), smaller.broken) == (2, 6)
    assert all(r.reward == 0.0 and r.stop == "answer" for r in smaller.rollouts)


def test_groups_of_a_real_policy_are_whole_and_reproducible() -> None:
    model = toy.model()

    def once() -> list[Rollout]:
        engine = HFEngine(model, slots=8, stop_ids=RENDERER.stop_ids, max_length=200)
        made = play_group(engine, toy.ParitySuite(), n=8, max_turns=4)
        assert made.broken == 0
        return made.rollouts

    first, second = once(), once()
    assert [r.ids for r in first] == [r.ids for r in second]
    assert {r.reward for r in first} == {0.0, 1.0}
    for rollout in first:
        check_mask(rollout, RENDERER.stop_ids)
