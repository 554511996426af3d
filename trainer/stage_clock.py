"""Where the time of a step goes. Stages may nest; each is charged only for what no inner stage took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds per stage: wall time, and processor time, which leaves out waiting for a remote answer."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = (0.0, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._charge()
        self._stack.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        now = (time.perf_counter(), time.process_time())
        if self._stack:
            self.wall[self._stack[-1]] += now[0] - self._since[0]
            self.cpu[self._stack[-1]] += now[1] - self._since[1]
        self._since = now

    def metrics(self) -> dict[str, float]:
        """`time/<stage>` in seconds, and `time/sgcd_overhead`: what credit adds, as a share of the rest of the step.

        Of the reference only processor time counts: a writer that waits for a distant model computes nothing here.
        """
        out = {f"time/{stage}": seconds for stage, seconds in self.wall.items()}
        plain = self.wall["rollout"] + self.wall["update"]
        credit = self.cpu["reference"] + self.wall["score"] + self.wall["credit"]
        return {**out, "time/sgcd_overhead": credit / plain if plain else 0.0}
