"""Sampling until enough groups are mixed."""

from __future__ import annotations

import asyncio

import pytest

from tests.trainer import toy
from trainer.data import Group, Rollout, Task
from trainer.rollout.dynamic_sampling import Batch, sample_batch, tasks_for
from trainer.rollout.task_order import TaskOrder

TASKS = toy.ParitySuite(tasks=10).tasks("train")


def outcome(task: Task, *rewards: float, broken: int) -> Group:
    return Group(task, [Rollout(task, [], [], [1], reward=r) for r in rewards], broken=broken)


def run(order: TaskOrder, mixed: set[str], groups: int = 3, times: int = 3, dynamic: bool = True) -> Batch:
    async def sample(task: Task) -> Group:
        return outcome(task, 0.0, 1.0 if task.id in mixed else 0.0, broken=1)

    return asyncio.run(sample_batch(sample, order, groups=groups, dynamic=dynamic, max_resample_times=times))


def test_sampling_stops_when_enough_groups_are_mixed() -> None:
    batch = run(TaskOrder(TASKS, 0), {t.id for t in TASKS})
    assert (len(batch.train), len(batch.sampled), batch.rounds, batch.errored) == (3, 3, 0, 3)


def test_sampling_continues_until_enough_and_trains_on_mixed_groups_only() -> None:
    order = TaskOrder(TASKS, 0)
    ids = [t.id for t in order.take(10)]
    order.load_state_dict({"position": 0, "mixed_share": 1.0})
    batch = run(order, {ids[0], ids[3], ids[8]})
    assert [g.task.id for g in batch.train] == [ids[0], ids[3], ids[8]]
    assert (batch.rounds, len(batch.sampled)) == (2, 9)  # three, four for the two that are missing, two for the last
    assert order.mixed_share == pytest.approx(1 / 3)
    assert batch.metrics()["rollout/resampled"] == 2


def test_sampling_gives_up_and_trains_on_what_is_there() -> None:
    batch = run(TaskOrder(TASKS, 0), set(), times=2)
    assert (batch.train, len(batch.sampled), batch.rounds) == ([], 3 + 6 + 6, 2)


def test_the_next_step_asks_for_as_many_as_the_last_one_needed() -> None:
    order = TaskOrder(TASKS, 0)
    even = {t.id for t in TASKS[::2]}
    run(order, even)
    share, before = order.mixed_share, order.position
    batch = run(order, {t.id for t in TASKS})
    assert len(batch.sampled) == order.position - before == tasks_for(3, share)
    assert (len(batch.train), batch.rounds) == (3, 0)
    assert [tasks_for(8, share) for share in (1.0, 0.8, 0.5, 0.1, 0.0)] == [8, 10, 16, 16, 16]


def test_without_dynamic_sampling_every_group_trains() -> None:
    batch = run(TaskOrder(TASKS, 0), set(), dynamic=False)
    assert (len(batch.train), batch.rounds) == (3, 0)


def test_a_group_of_one_is_dropped() -> None:
    async def sample(task: Task) -> Group:
        return outcome(task, 1.0, broken=14)

    batch = asyncio.run(sample_batch(sample, TaskOrder(TASKS, 0), groups=2, dynamic=False, max_resample_times=0))
    assert (batch.train, batch.dropped, batch.errored) == ([], 2, 28)
