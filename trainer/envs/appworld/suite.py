"""The suite and its episodes."""

from __future__ import annotations

import asyncio
import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.data import Message, Outcome, Task, Tool
from trainer.envs.appworld import data, prompt
from trainer.envs.appworld.pool import Pool, WorldDied, WorldProcess
from trainer.errors import EnvironmentBroken, PolicyCrashed, UserError, all_of

WORLD = Path(__file__).with_name("world.py")
SHARED = "shared"


class AppWorldSuite:
    """AppWorld's tasks, in the benchmark's splits.

    Args:
        root: the folder that holds `data/`; $APPWORLD_ROOT when left out.
        python: the interpreter that has the benchmark.
        worlds: how many episodes may have a world at once; the others wait for theirs, untimed.
        execution_timeout: seconds that one block of code may run before it is stopped, which the policy reads. Keep it
            below `env.timeout`, which drops the whole rollout. The benchmark's own figure is 100.

    Raises:
        UserError: the interpreter, the package or the data is missing, or an option has a value that does not fit.
    """

    name = "appworld"

    def __init__(
        self,
        root: str | None = None,
        python: str = str(data.PYTHON),
        worlds: int = 16,
        execution_timeout: float = 50.0,
    ):
        if type(worlds) is not int or worlds < 1:
            raise UserError(f"env.options.worlds: got {worlds!r}, needs a whole number of at least 1")
        if not isinstance(execution_timeout, (int, float)) or not execution_timeout >= 1:
            raise UserError(f"env.options.execution_timeout: got {execution_timeout!r}, needs seconds, at least 1")
        root = root or os.environ.get("APPWORLD_ROOT")
        all_of(lambda: data.check_package(Path(python)), lambda: data.check_root(root))
        self._root = data.check_root(root)
        ids = {split: data.task_ids(self._root, split) for split in data.SPLITS}
        self._ids = {split: found for split, found in ids.items() if found}
        self.splits: Mapping[str, int] = {split: len(found) for split, found in self._ids.items()}
        self.worlds = worlds
        self._timeout = float(execution_timeout)
        self._pool = Pool(
            Path(python).absolute(), WORLD, worlds, lambda folder: data.copy_shared(self._root, folder / SHARED)
        )
        self.tasks = functools.cache(self._tasks)

    def _tasks(self, split: str) -> list[Task]:
        return [data.task(self._root, split, name) for name in self._ids[split]]

    def make(self) -> AppWorldEnvironment:
        return AppWorldEnvironment(self._pool, self._root, self._timeout)

    def answer_literals(self, task: Task) -> list[str]:
        return data.literals(self._root, task)

    def refusal(self) -> Message:
        return {"role": "assistant", "content": f"I am sorry, I cannot do that.\n{prompt.block(prompt.GIVE_UP)}"}

    def close(self) -> None:
        """End all processes; the end of this one does the same."""
        self._pool.close()


class AppWorldEnvironment:
    """One task in a process of its own."""

    def __init__(self, pool: Pool, root: Path, execution_timeout: float):
        self._pool, self._root, self._timeout = pool, root, execution_timeout
        self._task: Task | None = None
        self._entered = False
        self._place: Path | None = None
        self._process: WorldProcess | None = None
        self.seconds = 0.0  # that the benchmark itself took, known with the outcome

    async def open(self) -> None:
        """Wait for a place in the pool."""
        if not self._entered:
            await self._pool.enter()
            self._entered = True

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        await self.open()
        self._task = task
        self._place = await asyncio.to_thread(self._lay_out, task.id)
        self._process = await self._pool.fork(self._place)
        await self._process.call("reset", task_id=task.id, timeout=self._timeout)
        return prompt.first_messages(task), []

    def _lay_out(self, name: str) -> Path:
        place = Path(tempfile.mkdtemp(prefix="world-", dir=self._pool.folder))
        data.lay_out(self._root, name, self._pool.folder / SHARED, place)
        return place

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        code, more = prompt.code_of(message)
        if not code:
            return [{"role": "user", "content": prompt.NO_CODE}], False
        world = self._live()
        try:
            result = await world.call("execute", code=code)
        except WorldDied:
            if await self._pool.ended_itself(world):
                raise PolicyCrashed(prompt.CRASHED) from None
            raise
        return [prompt.observation(result["output"], more)], result["done"]

    def _live(self) -> WorldProcess:
        if self._process is None:
            raise EnvironmentBroken("appworld: step or outcome before reset")
        return self._process

    async def outcome(self) -> Outcome:
        """The benchmark's evaluator, in a fresh process: what the policy's code did to its own cannot reach it."""
        played = self._live()
        assert self._task and self._place
        await self._pool.kill(played)
        data.reveal(self._root, self._task.id, self._place)
        self._process = judge = await self._pool.fork(self._place)
        verdict: dict[str, Any] = await judge.call("evaluate", task_id=self._task.id)
        self.seconds = played.seconds + judge.seconds
        success = bool(verdict.pop("success"))
        return Outcome(float(success), verdict, success=success)

    async def close(self) -> None:
        self._pool.discard(self._process, self._place)
        self._process = self._place = None
        if self._entered:
            self._entered = False
            self._pool.leave()
