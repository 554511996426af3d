"""What makes a step that was stopped before its update one that never happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

import torch

from trainer.errors import ReportedError
from trainer.rollout.task_order import TaskOrder

STOPS = (ReportedError, asyncio.CancelledError, KeyboardInterrupt)  # what stops a run in order: Ctrl-C cancels


class StepGuard:
    """Remembers where a step starts. If what runs inside is stopped, goes back there and leaves a checkpoint of it.

    Enter it only while the weights are those that the step started from; it may be entered several times.
    """

    def __init__(self, order: TaskOrder, generator: torch.Generator, keep_checkpoint: Callable[[], None]) -> None:
        self._order, self._generator, self._keep_checkpoint = order, generator, keep_checkpoint
        self._order_state, self._generator_state = order.state_dict(), generator.get_state()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, STOPS):
            self._order.load_state_dict(self._order_state)
            self._generator.set_state(self._generator_state)
            self._keep_checkpoint()
