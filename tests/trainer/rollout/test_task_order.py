"""The order of tasks."""

from __future__ import annotations

import pytest

from tests.trainer import toy
from trainer.rollout.task_order import TaskOrder

TASKS = toy.ParitySuite(tasks=10).tasks("train")


def test_an_epoch_holds_every_task_once_and_epochs_differ() -> None:
    order = TaskOrder(TASKS, seed=1)
    epochs = [[t.id for t in order.take(10)] for _ in range(3)]
    assert all(sorted(e) == sorted(t.id for t in TASKS) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert [t.id for t in TaskOrder(TASKS, seed=2).take(10)] != epochs[0]


def test_the_order_continues_from_its_state() -> None:
    order = TaskOrder(TASKS, seed=1)
    order.take(13)
    state = order.state_dict()
    expected = order.take(9)
    again = TaskOrder(TASKS, seed=1)
    again.load_state_dict(state)
    assert again.take(9) == expected


def test_no_task_is_refused() -> None:
    with pytest.raises(ValueError, match="tasks"):
        TaskOrder([], 0)
