"""Running coroutines concurrently, and interrupting one that holds the event loop."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Generator, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

AGAIN = 1.0  # seconds after which code that went on after an interruption is interrupted again


async def run_together(tasks: Iterable[Awaitable[T]]) -> list[T]:
    """Like `asyncio.gather`, but the first failure cancels the others instead of leaving them running."""
    running = [asyncio.ensure_future(task) for task in tasks]
    try:
        return list(await asyncio.gather(*running))
    except BaseException:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        raise


class Blocked(BaseException):
    """Code held the event loop longer than it may. No `Exception`: code that catches those must not go on."""


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise `Blocked` in code that takes longer than that, even where it sleeps, computes or waits for a socket.

    By SIGALRM, so in the main thread only, and only if nobody else uses that signal; elsewhere `Blocked` is raised when
    the code has ended. What holds the interpreter's lock (a long call into C) is interrupted when it gives it back.
    """
    began, armed = time.monotonic(), False

    def interrupt(number: int, frame: FrameType | None) -> None:
        if armed:
            raise Blocked

    alone = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    if alone:
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        armed = True
        yield
    finally:
        armed = False
        if alone:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if time.monotonic() - began > seconds:
        raise Blocked


class Interruptible(Awaitable[T]):
    """Awaits `call`, and raises `Blocked` when a stretch of it between two waits takes longer than `seconds`."""

    def __init__(self, call: Awaitable[T], seconds: float) -> None:
        self._call, self._seconds = call, seconds
        self.longest = 0.0  # stretch so far, seconds

    def __await__(self) -> Generator[Any, Any, T]:
        steps: Any = self._call.__await__()
        thrown: BaseException | None = None
        while True:
            began = time.monotonic()
            try:
                with interrupted_after(self._seconds):
                    try:
                        waits_for = steps.send(None) if thrown is None else steps.throw(thrown)
                    except StopIteration as stop:
                        found: T = stop.value
                        return found
            finally:
                self.longest = max(self.longest, time.monotonic() - began)
            try:
                yield waits_for
                thrown = None
            except BaseException as error:
                thrown = error
