"""A world for tests of the pool: does what it is told, in a real process under the real forker."""

from __future__ import annotations

import os
import time
from pathlib import Path


class World:
    def __init__(self, root: str):
        self.root = Path(root)
        self.steps = 0

    def execute(self, code: str) -> dict[str, object]:
        self.steps += 1
        word, _, rest = code.partition(" ")
        if word == "crash":
            os._exit(7)
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
        elif word == "environment":
            rest = ",".join(sorted(os.environ))
        return {"output": rest, "pid": os.getpid(), "parent": os.getppid(), "steps": self.steps, "done": word == "done"}
