"""Samples the siblings of a task, and distinguishes a broken episode from a lost environment."""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trainer.concurrency import run_together
from trainer.data import BugReport, Group, Rollout, Task
from trainer.errors import EnvironmentBroken, EnvironmentBug, EnvironmentLost, PromptTooLong, RolloutBug
from trainer.protocols import Renderer
from trainer.rollout.episode import RolloutSetup, play_episode
from trainer.text import encodable

log = logging.getLogger(__name__)


async def run_group(setup: RolloutSetup, task: Task, n: int) -> Group:
    """Run `n` siblings of a task at once.

    A broken rollout is run once more; one that breaks again is missing, so a group may be smaller than `n`. One that
    broke by a fault in code leaves a bug report in the group.

    Raises:
        PromptTooLong: the first prompt leaves no room for an answer.
    """
    group = Group(task, [])

    async def run_sibling() -> Rollout | None:
        for _ in range(2):
            rollout = Rollout(task, [], [], [])
            try:
                return await play_episode(setup, task, rollout)
            except (EnvironmentBroken, RolloutBug) as error:
                group.broken += 1
                group.problem = encodable(str(error))
                log.warning("dropped a rollout of %s: %s", task.id, group.problem)
                if isinstance(error, (EnvironmentBug, RolloutBug)):
                    group.bugs.append(_bug_report(rollout, error, setup.renderer))
        return None

    group.rollouts = [r for r in await run_together(run_sibling() for _ in range(n)) if r is not None]
    setup.grading.judge(group.rollouts)
    return group


def _bug_report(rollout: Rollout, error: Exception, renderer: Renderer) -> BugReport:
    try:
        text = renderer.decode(rollout.ids)
    except Exception as unreadable:
        text = f"decode: {unreadable!r}"
    trace = "".join(traceback.format_exception(error))
    return BugReport(rollout.task.id, str(error), trace, rollout.prompt_ids, rollout.ids, text, rollout.messages)


@dataclass
class GroupSampler:
    """Samples one group per task. A task whose prompt is too long gives an empty group and is remembered."""

    setup: RolloutSetup
    num_generations: int
    advance: Callable[[int], None]  # called with 1 when a task is finished
    tasks: int = 0
    too_long: list[PromptTooLong] = field(default_factory=list)

    async def __call__(self, task: Task) -> Group:
        self.tasks += 1
        try:
            return await run_group(self.setup, task, self.num_generations)
        except PromptTooLong as error:
            self.too_long.append(error)
            return Group(task, [])
        finally:
            self.advance(1)

    def check_that_some_fit(self) -> None:
        """Raise `PromptTooLong` if every task was too long."""
        if self.too_long and len(self.too_long) == self.tasks:
            raise self.too_long[0]


class EnvironmentMonitor:
    """Detects that every rollout breaks, whatever the task: then the environment is lost, not one episode broken."""

    def __init__(self, tasks: int) -> None:
        self._enough = min(2, tasks)  # one task alone may be what is broken
        self._broken: dict[str, str] = {}  # tasks that broke since the last whole rollout -> why

    def observe(self, groups: Sequence[Group]) -> None:
        """Take in groups as they were sampled.

        Raises:
            EnvironmentLost: every rollout broke, here and since the last whole one.
        """
        if any(group.rollouts for group in groups):
            self._broken.clear()
            return
        self._broken |= {group.task.id: group.problem for group in groups if group.broken}
        if self._broken and len(self._broken) >= self._enough:
            why = Counter(self._broken.values()).most_common(1)[0][0]
            raise EnvironmentLost(
                f"env: every rollout broke, of {len(self._broken)} tasks, each tried again: {why}. Fix that; the same "
                "command resumes from the newest checkpoint"
            )
