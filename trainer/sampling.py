"""Which tasks come next, and sampling until enough of their groups are mixed.

A group whose siblings all succeed or all fail has no advantage and teaches nothing. Dynamic sampling asks for more
tasks until `groups_per_step` groups are mixed, at most `max_resample_times` times; then the step trains on what is
there, and the metrics say so. Rounds are whole: a group that is slow counts as much as one that is quick.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.rollout import Pulse, together
from trainer.types import Group, Task

SampleGroup = Callable[[Task], Awaitable[tuple[Group, int]]]  # a task -> its siblings, and how many rollouts broke


class TaskOrder:
    """Every task once an epoch, in an order that depends on seed and epoch only: a position is all its state."""

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
        """Go on where `state` was taken."""
        self.position = int(state["position"])
        self.mixed_share = float(state["mixed_share"])


@dataclass(frozen=True)
class Batch:
    """What one step sampled, and the part of it that trains."""

    train: list[Group]
    sampled: list[Group]  # all groups with at least two rollouts
    errored: int  # rollouts that broke, retried ones included
    dropped: int  # groups left with fewer than two rollouts
    rounds: int  # of resampling

    def metrics(self) -> dict[str, float]:
        """Supply, as named in docs."""
        return {
            "rollout/errored": float(self.errored),
            "rollout/dropped_groups": float(self.dropped),
            "rollout/resampled": float(self.rounds),
            "by_group/trained": float(len(self.train)),
        }


async def collect(
    sample: SampleGroup,
    order: TaskOrder,
    *,
    groups: int,
    dynamic: bool,
    max_resample_times: int,
    pulse: Pulse | None = None,
) -> Batch:
    """Sample groups until `groups` of them are mixed (dynamic), or just `groups` groups.

    Raises:
        EnvironmentLost: `pulse` feels none.
    """
    sampled: list[Group] = []
    errored, dropped, rounds = 0, 0, 0
    asked = tasks_for(groups, order.mixed_share) if dynamic else groups
    while True:
        results = await together(sample(task) for task in order.take(asked))
        if pulse is not None:
            pulse.feel(results)
        errored += sum(broken for _, broken in results)
        whole = [group for group, _ in results if len(group.rollouts) >= 2]
        dropped += len(results) - len(whole)
        sampled += whole
        mixed = [group for group in sampled if group.mixed]
        if not dynamic or len(mixed) >= groups or rounds == max_resample_times:
            break
        rounds += 1
        asked = tasks_for(groups - len(mixed), len(mixed) / max(1, len(sampled)))
    order.mixed_share = len(mixed) / max(1, len(sampled))
    train = mixed[:groups] if dynamic else sampled
    return Batch(train, sampled, errored, dropped, rounds)


def tasks_for(groups: int, mixed_share: float) -> int:
    """How many tasks give `groups` mixed groups, if that share of them is mixed; at most twice as many.

    A round is as slow as its longest episode however few they are, so a large first round beats several small ones.
    """
    return min(2 * groups, math.ceil(groups / mixed_share)) if mixed_share else 2 * groups
