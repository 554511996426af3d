"""What a row must say about where it came from: device, versions, commit, and what else the machine was doing."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def device_name(device: str) -> str:
    """A name for people: the GPU's, or the processor's and its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({_instructions()}), {os.cpu_count()} cores"


def _instructions() -> str:
    """The widest vector instructions, by which processors of one name differ."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    order = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "avx512f": "AVX512", "avx2": "AVX2"}
    return next((name for flag, name in order.items() if flag in flags), platform.machine())


def fast_dtypes(device: str) -> tuple[str, ...]:
    """The dtypes worth measuring: bf16 where there are instructions for it; elsewhere it is emulated, and very slow."""
    if device == "cuda":
        return ("bf16",)
    return ("bf16", "fp32") if _instructions() in ("AMX", "AVX512_BF16") else ("fp32",)


def commit() -> str:
    """The short sha, marked if files of the library, the trainer or the suite differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    sha = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", "sgcd_kernels", "csrc", "trainer", "bench/*.py", "bench/providers")
    return f"{sha}-dirty" if sha and changed else sha or "none"


class Elsewhere:
    """How many cores other programs used on average since this was made; None where the system does not say."""

    def __init__(self) -> None:
        self.start = self._now()

    def cores(self) -> float | None:
        now = self._now()
        if now is None or self.start is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self.start, now))
        return max(0.0, busy - own) / max(wall, 1e-9)

    def _now(self) -> tuple[float, float, float] | None:
        """(seconds on the wall, seconds of all processors, ours among them)"""
        stat = Path("/proc/stat")
        if not stat.is_file():
            return None
        ticks = [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]  # idle, iowait
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = sum(u.ru_utime + u.ru_stime for u in usage)
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own
