"""Sampling until enough groups are mixed.

A group whose siblings all have the same reward has advantage 0 and no gradient. Dynamic sampling takes more tasks until
`groups_per_step` groups are mixed, for at most `max_resample_times` rounds; then the step trains on the mixed groups it
has, and the metrics show it. A round is always completed, so that slow groups count as much as quick ones.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from trainer.concurrency import run_together
from trainer.data import BugReport, Group, Task
from trainer.rollout.siblings import EnvironmentMonitor
from trainer.rollout.task_order import TaskOrder


@dataclass(frozen=True)
class Batch:
    """What one step sampled, and the part of it that trains."""

    train: list[Group]
    sampled: list[Group]  # all groups with at least two rollouts
    errored: int  # rollouts that broke, retried ones included
    dropped: int  # groups left with fewer than two rollouts
    rounds: int  # of resampling
    too_long: int = 0  # tasks whose prompt left no room
    bugs: list[BugReport] = field(default_factory=list)  # of the errored rollouts, those that a fault in code broke

    def metrics(self) -> dict[str, float]:
        """How many groups and rollouts came through; names as in the documentation."""
        return {
            "rollout/errored": float(self.errored),
            "rollout/bugs": float(len(self.bugs)),
            "rollout/dropped_groups": float(self.dropped),
            "rollout/resampled": float(self.rounds),
            "by_group/trained": float(len(self.train)),
            "rollout/too_long": float(self.too_long),
        }


async def sample_batch(
    sample: Callable[[Task], Awaitable[Group]],
    order: TaskOrder,
    *,
    groups: int,
    dynamic: bool,
    max_resample_times: int,
    monitor: EnvironmentMonitor | None = None,
) -> Batch:
    """Sample groups until `groups` of them are mixed (dynamic), or just `groups` groups.

    Raises:
        EnvironmentLost: `monitor` finds that every rollout breaks.
    """
    sampled: list[Group] = []
    bugs: list[BugReport] = []
    errored, dropped, rounds = 0, 0, 0
    asked = tasks_for(groups, order.mixed_share) if dynamic else groups
    while True:
        results = await run_together(sample(task) for task in order.take(asked))
        if monitor is not None:
            monitor.observe(results)
        errored += sum(group.broken for group in results)
        bugs += [bug for group in results for bug in group.bugs]
        whole = [group for group in results if len(group.rollouts) >= 2]
        dropped += len(results) - len(whole)
        sampled += whole
        mixed = [group for group in sampled if group.mixed]
        if not dynamic or len(mixed) >= groups or rounds == max_resample_times:
            break
        rounds += 1
        asked = tasks_for(groups - len(mixed), len(mixed) / max(1, len(sampled)))
    order.mixed_share = len(mixed) / max(1, len(sampled))
    train = mixed[:groups] if dynamic else sampled
    return Batch(train, sampled, errored, dropped, rounds, bugs=bugs)


def tasks_for(groups: int, mixed_share: float) -> int:
    """How many tasks give `groups` mixed groups, if that share of them is mixed; at most twice as many.

    A round is as slow as its longest episode however few they are, so a large first round beats several small ones.
    """
    return min(2 * groups, math.ceil(groups / mixed_share)) if mixed_share else 2 * groups
