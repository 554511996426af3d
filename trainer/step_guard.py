"""Undoes a step that was stopped before its update."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

import torch

from trainer import randomness
from trainer.errors import ReportedError
from trainer.rollout.task_order import TaskOrder

STOPS = (ReportedError, asyncio.CancelledError, KeyboardInterrupt)  # what stops a run in order: Ctrl-C cancels


class StepGuard:
    """Restores the state at the start of a step, and writes a checkpoint of it, if the step is stopped inside.

    Enter it only before the step's update; it may be entered several times.
    """

    def __init__(self, order: TaskOrder, generator: torch.Generator, keep_checkpoint: Callable[[], None]) -> None:
        self._order, self._generator, self._keep_checkpoint = order, generator, keep_checkpoint
        self._order_state, self._generator_state = order.state_dict(), generator.get_state()
        self._random_state = randomness.get_state()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, STOPS):
            self._order.load_state_dict(self._order_state)
            self._generator.set_state(self._generator_state)
            randomness.set_state(self._random_state)
            self._keep_checkpoint()
