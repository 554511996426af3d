"""Runs a command that must not outlive the process that started it, however that one ends.

    python guard.py PARENT_PID COMMAND...

SIGKILL leaves no time to stop a server, and the kernel's own remedy (PR_SET_PDEATHSIG) follows the *thread* that
forked, and spares the command's children. So this small process stands between: it leads a process group of its own,
looks whether PARENT_PID is still its parent, and in the end takes the whole group with it. It needs nothing but the
standard library, and starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

EVERY = 0.2  # seconds between two looks
GRACE = 3.0  # seconds between asking the command to end and making it


def main(parent: int, command: list[str]) -> None:
    """Run `command` until it ends, SIGTERM comes or `parent` is gone; then end it, all its children, and ourselves."""
    assert os.getpgrp() == os.getpid(), "start it as a session of its own: its group is what it ends"
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    child = subprocess.Popen(command)
    while child.poll() is None and not signals and os.getppid() == parent:
        time.sleep(EVERY)
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    os.killpg(0, signal.SIGKILL)  # what the command left behind, and this process


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
