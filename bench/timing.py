"""Fair timing: variants interleaved, cold caches, and runs too short for the timer repeated.

On a GPU: CUDA events, and the L2 cache overwritten before each sample. On a CPU: `perf_counter`. Both rotate between
copies of the inputs, so that no run finds its operands in the caches. On a CPU each sample follows an untimed run of
the same variant, so that no variant pays for memory that its predecessor returned to the system: in a virtual machine,
getting it back from the host takes 1-2 ms per MB.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SHORTEST = {"cpu": 5e-3, "cuda": 5e-4}  # least seconds of a sample; a shorter run is repeated within it
SAMPLES = 5
SLOW = 8.0  # seconds; a longer run is sampled once, after its warm-up
SPEND = 4.0  # seconds of samples, beyond the first three, for a variant that is not slow
WARMED = 2.0  # seconds; a longer run is not warmed up before each sample: page faults are a small part of it

# Takes the number of the run (which selects a copy of the inputs), prepares it untimed, returns the timed function.
Prepare = Callable[[int], Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: the median, 20th and 80th percentile of the samples, each a mean over `repeats`."""

    median: float
    p20: float
    p80: float
    samples: int
    repeats: int


class Stopwatch:
    """Measures the seconds of a number of runs on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.dirt = torch.empty(0)
        if device == "cuda":
            size = torch.cuda.get_device_properties(0).L2_cache_size
            self.dirt = torch.empty(2 * size, dtype=torch.uint8, device="cuda")

    def __call__(self, prepare: Prepare, first: int, repeats: int) -> float:
        runs = [prepare(k) for k in range(first, first + repeats)]
        if self.device == "cuda":
            return self._events(runs)
        start = time.perf_counter()
        for run in runs:
            run()
        return time.perf_counter() - start

    def _events(self, runs: list[Callable[[], object]]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.dirt.zero_()
        start.record()
        for run in runs:
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def repeats_for(seconds: float, device: str) -> int:
    """How often to repeat a run of `seconds` so that a sample is long enough for the timer."""
    return max(1, min(10_000, int(SHORTEST[device] / max(seconds, 1e-9)) + 1)) if seconds < SHORTEST[device] else 1


def samples_for(seconds: float, samples: int = SAMPLES) -> int:
    """How many samples to take of a run of `seconds`: fewer if slow, but at least three unless one takes very long."""
    if seconds > SLOW:
        return 1
    return max(min(3, samples), min(samples, int(SPEND / max(seconds, 1e-9))))


def time_interleaved(
    runs: dict[str, Prepare],
    device: str,
    samples: int = SAMPLES,
    after_failure: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """(times of all variants, sampled in turn, so that other load affects all equally; the variants that raised)"""
    watch = Stopwatch(device)
    plan: dict[str, tuple[int, int]] = {}
    warm: dict[str, bool] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, Exception] = {}
    for name, run in runs.items():  # the first run sets the number of samples; it is one itself if no warm-up is needed
        try:
            once = watch(run, 0, 1)
            plan[name] = (samples_for(once, samples), repeats_for(once, device))
            warm[name] = device == "cpu" and plan[name][1] == 1 and once < WARMED
            if plan[name][1] == 1 and not warm[name]:
                seconds[name].append(once)
        except Exception as error:
            failed[name] = error
            after_failure()
    for turn in range(samples):
        for name, (wanted, repeats) in plan.items():
            if len(seconds[name]) >= wanted or name in failed:
                continue
            try:
                if warm[name]:
                    runs[name](turn)()
                seconds[name].append(watch(runs[name], turn * repeats + 1, repeats) / repeats)
            except Exception as error:
                failed[name] = error
                after_failure()
    return {n: summary(s, plan[n][1]) for n, s in seconds.items() if s and n not in failed}, failed


def summary(seconds: list[float], repeats: int) -> Timing:
    quantiles = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 4
    median = statistics.median(seconds)
    return Timing(median * 1e3, quantiles[0] * 1e3, quantiles[3] * 1e3, len(seconds), repeats)


class OtherLoad:
    """How many cores other programs used on average since this was created; None if the system does not report it."""

    def __init__(self) -> None:
        self.start = self._now()

    def cores(self) -> float | None:
        now = self._now()
        if now is None or self.start is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self.start, now))
        return max(0.0, busy - own) / max(wall, 1e-9)

    def _now(self) -> tuple[float, float, float] | None:
        """(wall-clock seconds, busy seconds of all processors, CPU seconds of this process and its children)"""
        stat = Path("/proc/stat")
        if not stat.is_file():
            return None
        ticks = [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]  # idle, iowait
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = sum(u.ru_utime + u.ru_stime for u in usage)
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own
