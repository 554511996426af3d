"""SIGINT, SIGTERM and SIGHUP end a run in order: with a checkpoint, a line, and the exit code 128 + signal.

The first signal cancels the main coroutine, which notices it where it next waits: the update of a step, or a checkpoint
that is being written, is finished before. A second one, at least `TWICE` seconds later, ends the process at once. What
comes sooner is the same request: `timeout`, schedulers, and a shell's Ctrl-C through a wrapper deliver one to the
process and one to its group.

Servers and worlds that the run has started lead process groups of their own and end with it, so a signal to our group
does not take them away before the run has stopped.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Coroutine
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TWICE = 1.0  # seconds
THREADS = 5.0  # seconds for threads to end when everything is saved: a call into an environment may never return


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end, and it has stopped in order."""

    def __init__(self, number: int, advice: str = "") -> None:
        name = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        super().__init__(f"{name}: {advice}" if advice else name)
        self.exit_code = 128 + number  # as a shell reports it: 130, 143, 129


class StopSignals:
    """While entered, the first signal cancels the coroutine that `run` runs, or raises `Stopped` if there is none.

    A signal that is ignored (`nohup`, a shell's background job) or handled by somebody else is left alone. `advice` is
    what `Stopped` says about going on.
    """

    active: StopSignals | None = None
    ends_process = False  # what the command line sets: once stopped, the process ends, and a late signal keeps its code

    def __init__(self, advice: str = "") -> None:
        self.advice = advice
        self.received: int | None = None
        self._when = 0.0
        self._task: asyncio.Task[Any] | None = None
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopSignals:
        StopSignals.active = self
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        StopSignals.active = None
        if self.received is not None and StopSignals.ends_process:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked: a signal ends it as it would without us
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.received is not None:
            if time.monotonic() - self._when >= TWICE:
                os._exit(128 + number)
        else:
            self.received, self._when = number, time.monotonic()
            if self._task is None:
                raise Stopped(number, self.advice)
            self._task.cancel()
            self._task.get_loop().call_soon_threadsafe(lambda: None)  # wakes a loop that waits

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """`asyncio.run(main)`; raises `Stopped` if a signal came and `main` has ended."""
        if self.received is not None:  # and what was raised then was caught, by a library or a destructor
            main.close()
            raise Stopped(self.received, self.advice)
        leaving: threading.Timer | None = None

        async def cancellable() -> T:
            nonlocal leaving
            self._task = asyncio.current_task()
            try:
                return await main
            finally:
                if self.received is not None:
                    stopped = Stopped(self.received, self.advice)
                    leaving = leave_soon(stopped.exit_code, str(stopped))  # asyncio.run waits for threads
                self._task = None

        try:
            return asyncio.run(cancellable())
        except asyncio.CancelledError:
            if self.received is None:
                raise
            raise Stopped(self.received, self.advice) from None
        finally:
            if leaving is not None:
                leaving.cancel()


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run(main)`, ended in order by the first signal: then `Stopped` is raised once `main` has ended."""
    if StopSignals.active is not None:
        return StopSignals.active.run(main)
    with StopSignals() as signals:
        return signals.run(main)


def check() -> None:
    """Cancel the coroutine that calls this if a signal came: the cancellation itself may have been swallowed."""
    if StopSignals.active is not None and StopSignals.active.received is not None:
        raise asyncio.CancelledError


def leave_soon(code: int, last_words: str = "") -> threading.Timer:
    """End this process in `THREADS` seconds, unless it has ended by then or the timer is cancelled."""

    def leave() -> None:
        if last_words:
            print(last_words, file=sys.stderr, flush=True)
        os._exit(code)

    timer = threading.Timer(THREADS, leave)
    timer.daemon = True
    timer.start()
    return timer
