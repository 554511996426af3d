"""The order of the training tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from trainer.data import Task


class TaskOrder:
    """Every task once per epoch, in an order that depends on seed and epoch only: a position is all its state."""

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        if not tasks:
            raise ValueError("tasks: got none, needs at least one")
        self._tasks = list(tasks)
        self._seed = seed
        self._epochs: dict[int, list[int]] = {}  # the last order used
        self.position = 0  # tasks given since the start of the run
        self.mixed_share = 1.0  # of the groups of the last step: how many tasks the next one will need

    def take(self, n: int) -> list[Task]:
        """The next `n` tasks."""
        chosen = [self._at(self.position + i) for i in range(n)]
        self.position += n
        return chosen

    def _at(self, position: int) -> Task:
        epoch, index = divmod(position, len(self._tasks))
        if epoch not in self._epochs:
            order = list(range(len(self._tasks)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._epochs = {epoch: order}
        return self._tasks[self._epochs[epoch][index]]

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands."""
        return {"position": self.position, "mixed_share": self.mixed_share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state` was taken."""
        self.position = int(state["position"])
        self.mixed_share = float(state["mixed_share"])
