"""Signals end a run in order, at once when they come twice, and never when they were to be ignored."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from trainer import commands, stop_signals
from trainer.stop_signals import Stopped

ROOT = Path(__file__).parents[2]

# It waits in the way that argv[1] says, and says "saved" when it is cancelled.
PROGRAM = """
import asyncio, multiprocessing, os, signal, subprocess, sys, threading, time
from trainer import stop_signals
from trainer.stop_signals import Stopped

async def main(how):
    try:
        print("ready", flush=True)
        if how == "sleeps":
            await asyncio.sleep(60)
        elif how == "computes":  # a step's update: no waiting in it
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                pass
            print("computed", flush=True)
            await asyncio.sleep(60)
        elif how == "thread":  # a call into an environment that never returns
            await asyncio.to_thread(time.sleep, 60)
        elif how == "deaf":
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass
        elif how == "child":  # of ours, which must end by a signal of its own
            fork = multiprocessing.get_context("fork")
            born = fork.Event()
            child = fork.Process(target=lambda: (born.set(), time.sleep(60)))
            child.start()
            born.wait()
            os.kill(child.pid, signal.SIGTERM)
            child.join()
            print("child", child.exitcode, flush=True)
            await asyncio.sleep(60)
    finally:
        print("saved", flush=True)

code = 0
try:
    with stop_signals.StopSignals("the same command resumes from the newest checkpoint"):
        stop_signals.run(main(sys.argv[1]))
except Stopped as stopped:
    print(stopped, flush=True)
    code = stopped.exit_code
if code:
    stop_signals.leave_soon(code)
sys.exit(code)
"""


class Program:
    def __init__(self, how: str, ignored: int | None = None) -> None:
        def prepare() -> None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, how],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=prepare,
        )  # fmt: skip
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, list[str]]:
        said, _ = self.process.communicate(timeout=50)
        return self.process.returncode, said.splitlines()


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM: the same command resumes from the newest checkpoint"),
        (signal.SIGHUP, 129, "stopped by SIGHUP: the same command resumes from the newest checkpoint"),
        (signal.SIGINT, 130, "interrupted: the same command resumes from the newest checkpoint"),
    ],
)
def test_the_first_signal_ends_in_order(number: int, code: int, line: str) -> None:
    program = Program("sleeps")
    program.process.send_signal(number)
    assert program.end() == (code, ["saved", line])


def test_one_request_that_is_delivered_twice_is_one(tmp_path: Path) -> None:
    """As `timeout` does, which signals the process and its group."""
    program = Program("computes")
    for _ in range(2):
        program.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    code, said = program.end()
    assert code == 143 and said[:2] == ["computed", "saved"]


def test_a_second_signal_leaves_at_once() -> None:
    program = Program("deaf")
    program.process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert program.process.poll() is None
    program.process.send_signal(signal.SIGTERM)
    assert program.end() == (143, [])


def test_a_thread_that_never_ends_does_not_keep_the_process() -> None:
    program, begun = Program("thread"), time.monotonic()
    program.process.send_signal(signal.SIGTERM)
    code, said = program.end()
    assert code == 143 and said[0] == "saved" and said[-1].startswith("stopped by SIGTERM")
    assert time.monotonic() - begun < 40


def test_a_forked_worker_is_ended_by_its_own_signal() -> None:
    program = Program("child")
    assert program.line() == f"child {-signal.SIGTERM}"
    program.process.send_signal(signal.SIGTERM)
    assert program.end()[0] == 143


def test_what_was_to_be_ignored_is_ignored() -> None:
    """`nohup` ignores SIGHUP, and a shell's background jobs SIGINT."""
    program = Program("sleeps", ignored=signal.SIGHUP)
    program.process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert program.process.poll() is None
    os.kill(program.process.pid, signal.SIGTERM)
    assert program.end()[0] == 143


def test_a_signal_whose_exception_was_caught_stops_the_coroutine_before_it_begins() -> None:
    """A library that loads a model may catch everything, and a destructor does."""

    async def main() -> None:
        raise AssertionError("it began")

    with stop_signals.StopSignals() as signals:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Stopped, match=r"^stopped by SIGTERM$"):
            stop_signals.run(main())


@pytest.mark.parametrize("command", ["eval", "view", "check"])
def test_only_a_training_is_said_to_resume(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(source: Path, overrides: Sequence[str]) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return 0

    monkeypatch.setitem(commands.COMMANDS, command, stopped)
    assert commands.main([command, "run"]) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM: nothing was changed; the same command begins again\n"


def test_a_second_delivery_after_the_end_keeps_the_exit_code() -> None:
    """The first may end a run within the time that `timeout` takes for the second."""
    program = """
import os, signal, sys
from trainer.stop_signals import StopSignals, Stopped
StopSignals.ends_process = True
try:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
except Stopped as stopped:
    os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(stopped.exit_code)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 143
