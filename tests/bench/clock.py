"""A clock that tests advance."""

from __future__ import annotations


class Clock:
    """In the place of `time`: what sleeps takes that long, and all else nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
