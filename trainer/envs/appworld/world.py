"""One AppWorld task in this process, as the forker's processes serve it. Runs where `appworld` is installed.

`reset` and `execute` play with a root that holds no ground truth; `evaluate` is asked of another process, after the
played one has ended and when the ground truth has been put into the root.
"""

from __future__ import annotations

from typing import Any

from appworld import update_root
from appworld.apps import build_main_app, get_all_apps
from appworld.environment import AppWorld
from appworld.evaluator import evaluate_task

EXPERIMENT = "episode"
MAX_OUTPUT = 1_000_000  # characters; the rollout cuts to env.max_observation_chars
build_main_app(get_all_apps())  # imports every app: the slow part, shared by all forked processes


class World:
    def __init__(self, root: str):
        update_root(root)
        self._world: AppWorld | None = None

    def reset(self, task_id: str, timeout: float) -> None:
        """Open the task. `timeout`: seconds that one block of code may take, whole ones."""
        self._world = AppWorld(
            task_id=task_id,
            experiment_name=EXPERIMENT,
            load_ground_truth=False,
            timeout_seconds=max(1, int(timeout)),
        )

    def execute(self, code: str) -> dict[str, Any]:
        """Run one block; give what it printed, and whether the task has been marked complete."""
        assert self._world is not None
        output = self._world.execute(code)
        return {"output": output[:MAX_OUTPUT], "done": self._world.task_completed()}

    def evaluate(self, task_id: str) -> dict[str, Any]:
        """The benchmark's own verdict on the state that the played world has saved. Counts only: no requirement, whose
        text tells the answer, leaves this process."""
        tracker = evaluate_task(task_id=task_id, experiment_name=EXPERIMENT, save_report=False)
        return {"success": tracker.success, "passed": tracker.pass_count, "tests": tracker.num_tests}
