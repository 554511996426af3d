"""Peak memory of one run beyond its inputs; outputs and gradients count.

On a GPU it is the caching allocator's peak. On a CPU it is the peak resident set of a child process that has loaded
the inputs and warmed up the provider: the operating system's high-water mark (VmHWM), reset just before the run. glibc
is set to return every block of a megabyte at once; otherwise the run would reuse memory of the warm-up, which would not
be counted. The child is also the provider's first run: a crash ends only the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import resource
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench import inputs, providers
from bench.cases import Case
from bench.inputs import Inputs
from bench.providers import Provider, describe_failure, run_once

TIMEOUT = 120.0  # seconds for a child's two runs
START = "forkserver"  # forks from a process without threads: OpenMP does not survive a fork
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)
SPARE = 512 << 20  # bytes of the machine's free memory that a child must not use


@dataclass(frozen=True)
class Trial:
    """Peak bytes of a trial run beyond the inputs (None if this system cannot measure them), or why it failed."""

    peak: int | None = None
    failure: str = ""


def measure_on_cuda(p: Provider, i: Inputs, mode: str) -> tuple[Trial, dict[str, torch.Tensor]]:
    """Peak memory and outputs of one run."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run_once(p, i, mode)
    torch.cuda.synchronize()
    return Trial(torch.cuda.max_memory_allocated() - before), found


class ChildTrials:
    """Runs trials of one case in child processes, one per provider."""

    def __init__(self, case: Case, i: Inputs, files: tuple[Path, ...]) -> None:
        self.case, self.files = case, files
        self.folder = tempfile.TemporaryDirectory(prefix="bench-")
        self.path = Path(self.folder.name) / "inputs.pt"
        torch.save({f.name: getattr(i, f.name) for f in fields(i)}, self.path)
        self.context: Any = multiprocessing.get_context(START)
        if START == "forkserver":
            multiprocessing.set_forkserver_preload(["bench.providers.preload"])

    def __enter__(self) -> ChildTrials:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    def run(self, p: Provider) -> Trial:
        """Run the provider in a child. If the child dies, the trial holds the reason."""
        receive, send = self.context.Pipe(duplex=False)
        arguments = (send, p.op, p.name, self.case, self.path, self.files, torch.get_num_threads())
        child = self.context.Process(target=_child, args=arguments, daemon=False)
        child.start()
        send.close()
        found: Trial | None = None
        if receive.poll(TIMEOUT):
            with contextlib.suppress(EOFError):
                found = receive.recv()
        else:
            found = Trial(failure=f"gave up after {TIMEOUT:.0f} s")
            child.kill()
        child.join()
        return found or Trial(failure=describe_exit(child.exitcode or 0))


def describe_exit(code: int) -> str:
    """Why a process ended without a report."""
    if code == -signal.SIGKILL:
        return "killed by the system, most likely out of memory"
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _child(send: Connection, op: str, name: str, case: Case, path: Path, files: tuple[Path, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        providers.load(files)
        p = next(p for p in providers.providers_of(op) if p.name == name)
        send.send(_measure(p, Inputs(**torch.load(path)), case))
    except BaseException as error:
        send.send(Trial(failure=describe_failure(error)))


def _measure(p: Provider, i: Inputs, case: Case) -> Trial:
    _limit_memory()
    libc, mode = give_blocks_back(), case.mode
    # A call on small inputs loads the libraries; code compiled for specific shapes needs the real ones.
    run_once(p, i if p.compiles else inputs.make(replace(case, shape="tiny", tokens=64)), mode)
    return Trial(peak_of(lambda: run_once(p, i, mode), libc))


def peak_of(call: Callable[[], object], libc: ctypes.CDLL | None) -> int | None:  # bytes
    """A call's peak resident memory above the current; None if this system cannot measure it."""
    gc.collect()
    if libc:
        libc.malloc_trim(0)
    before = _resident("VmRSS")
    if not _reset_peak() or before is None:
        return None
    call()
    peak = _resident("VmHWM")
    return None if peak is None else max(0, peak - before)


def _limit_memory() -> None:
    """Make allocations beyond the machine's memory fail in Python, before the kernel kills a process."""
    free, size = _meminfo(), _resident("VmSize")
    if free is not None and size is not None:
        resource.setrlimit(resource.RLIMIT_AS, (size + max(0, free - SPARE),) * 2)


def give_blocks_back() -> ctypes.CDLL | None:
    """Set glibc to map each block of a megabyte separately; return the C library."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(TRIM_THRESHOLD, 1 << 20)
    except (OSError, AttributeError):  # not glibc: VmHWM may be too low by the memory that the warm-up left allocated
        return None
    return libc


def _resident(field: str) -> int | None:
    return _field(Path("/proc/self/status"), field)


def _meminfo() -> int | None:
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _field(file: Path, name: str) -> int | None:  # bytes
    if not file.is_file():
        return None
    line = next((x for x in file.read_text().splitlines() if x.startswith(f"{name}:")), "")
    return int(line.split()[1]) * 1024 if line else None


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the present size
    except OSError:
        return False
    return True
