"""A world for tests of the pool: executes commands, in a real process under the real forker."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path


class World:
    def __init__(self, root: str):
        self.root = Path(root)
        self.steps = 0

    def reset(self, task_id: str, timeout: float) -> None: ...

    def evaluate(self, task_id: str) -> dict[str, object]:
        return {"success": True}

    def execute(self, code: str) -> dict[str, object]:
        self.steps += 1
        word, _, rest = code.partition(" ")
        if word == "crash":
            os._exit(7)
        elif word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "exit":
            raise SystemExit
        elif word == "deep":
            raise RecursionError
        elif word == "kill_forker":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(3600)
        elif word in ("deaf", "gone"):
            os.closerange(3, 100)
            time.sleep(3600 if word == "gone" else 0)
        elif word == "hang":
            time.sleep(3600)
        elif word == "sleep":
            time.sleep(float(rest))
        elif word == "raise":
            raise ValueError(rest)
        elif word == "greedy":
            try:
                bytearray(64 << 30)
            except MemoryError:
                return {"output": "MemoryError", "done": False}
        elif word == "random":
            rest = str(random.random())
        elif word == "environment":
            rest = ",".join(sorted(os.environ))
        return {"output": rest, "pid": os.getpid(), "parent": os.getppid(), "steps": self.steps, "done": word == "done"}
