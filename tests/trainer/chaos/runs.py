"""Training runs in forked processes whose file events fail: `python runs.py`, driven by lines of JSON.

Importing torch takes seconds and a run of three steps some tenths, so one process imports everything, under
LD_PRELOAD=faults.so, and forks one for every run. A request is {"commands": [[argument, ...], ...], "out": FILE,
"writer_fails_at": step, "fault": [folder, mode, at, number, kinds, log file]}; the answer is the exit status of the
last command, -N after signal N. Both output streams go to OUT.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

import torch

from tests.trainer import toy
from trainer import commands, envs, loop  # noqa: F401 - loop is imported before the fork
from trainer.data import Group
from trainer.errors import UserError
from trainer.records import view_page  # noqa: F401
from trainer.references import writers


class SpendingWriter(writers.ContrastWriter):
    """Remembers what it spent; its endpoint is gone in the first process that comes to step `fails_at`."""

    fails_at = 0

    def __init__(self) -> None:
        self.calls = 0

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]

    async def write(self, groups: list[Group]) -> None:
        self.calls += 1
        await super().write(groups)
        if self.calls == type(self).fails_at:
            raise UserError("writer.base_url: the endpoint is gone")


def child(request: dict[str, Any]) -> int:
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    SpendingWriter.fails_at = request["writer_fails_at"]
    folder, mode, at, number, kinds, log = request["fault"]
    log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if log else -1
    ctypes.CDLL(None).faults_arm(folder.encode(), mode, ctypes.c_long(at), number, kinds, log_fd)
    code = 0
    for command in request["commands"]:
        code = commands.main(command)
        print(f"[{code}]", flush=True)
        if code not in (0, 2):  # a signal
            break
    return code


def main() -> None:
    torch.set_num_threads(1)
    envs.SUITES["parity"] = toy.__name__
    writers.load = lambda *_: SpendingWriter()  # type: ignore[assignment]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            code = 70
            try:
                code = child(request)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers)


if __name__ == "__main__":
    main()
