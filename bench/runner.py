"""One case, all its providers side by side: try, check, time, and say in a row what came of it."""

from __future__ import annotations

import contextlib
import datetime
import gc
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from bench import calls, gate, machine, memory, registry, timing, truth
from bench.cases import METRICS, OPS, Case
from bench.inputs import Inputs
from bench.registry import Provider
from bench.rows import OK, Row

FLOOR = "gemm"
BROKEN = 75  # exit code of a process whose GPU no longer answers


def run_case(
    case: Case,
    providers: Sequence[Provider],
    *,
    metrics: Iterable[str] = METRICS,
    samples: int = timing.SAMPLES,
    files: tuple[Path, ...] = (),
    failed: Mapping[str, str] = MappingProxyType({}),  # providers that an earlier attempt died of, and how
    note: Callable[[str], None] = lambda provider: None,  # called before a provider is touched
) -> list[Row]:
    """The rows of a case, one a provider. Nothing that a provider does but killing this process escapes its row."""
    blank = _blank(case)
    rows = {p.name: replace(blank, provider=p.name, version=registry.version(p.package)) for p in providers}
    willing = []
    for p in providers:
        reason = failed.get(p.name) or p.refuses(case)
        if reason is None:
            willing.append(p)
        else:
            rows[p.name].status = reason
    if not willing:
        return list(rows.values())
    i, exact = truth.prepare(case)
    for row in rows.values():
        row.kept = i.kept
    sound = _try_all(case, i, exact, willing, rows, set(metrics), files, note)
    if "speed" in metrics:
        _time_all(case, i, sound, rows, samples, note)
    return list(rows.values())


def _try_all(
    case: Case,
    i: Inputs,
    exact: truth.Truth,
    providers: Sequence[Provider],
    rows: dict[str, Row],
    metrics: set[str],
    files: tuple[Path, ...],
    note: Callable[[str], None],
) -> list[Provider]:
    """Memory and correctness of each provider; those that may be timed."""
    sound = []
    with contextlib.ExitStack() as stack:
        children = None
        if case.device == "cpu" and "memory" in metrics:
            children = stack.enter_context(memory.ChildTrials(case, i, files))
        for p in providers:
            note(p.name)
            row = rows[p.name]
            try:
                trial, found = _try(p, i, case, children)
                if trial.peak is not None and "memory" in metrics and not p.bare:
                    row.peak_mb = trial.peak / 2**20
                row.status = trial.failure or OK
                if not trial.failure and not p.bare:
                    verdict = gate.judge(case.op, case.dtype, i, exact, found)
                    row.error, row.grad_error, row.status = verdict.error, verdict.grad_error, verdict.reason or OK
                del found  # or it would be in the way of the next one's memory
            except Exception as error:
                row.status = calls.name_failure(error)
                _check_device(case)
            if row.status == OK:
                sound.append(p)
    return sound


def _try(
    p: Provider, i: Inputs, case: Case, children: memory.ChildTrials | None
) -> tuple[memory.Trial, dict[str, torch.Tensor]]:
    """A trial run and its values; on a CPU in a child first, which may die of it."""
    if case.device == "cuda":
        calls.once(p, i, case.mode)  # compiles, tunes
        return memory.on_cuda(p, i, case.mode)
    trial = children.run(p) if children is not None and not p.bare else memory.Trial()
    return trial, {} if trial.failure else calls.once(p, i, case.mode)


def _time_all(
    case: Case,
    i: Inputs,
    providers: Sequence[Provider],
    rows: dict[str, Row],
    samples: int,
    note: Callable[[str], None],
) -> None:
    gc.collect()
    copies = [i, i.copy()]
    elsewhere = machine.Elsewhere()
    runs = {p.name: _noted(calls.prepare(p, copies, case.mode), p.name, note) for p in providers}
    times, failed = timing.interleaved(runs, case.device, samples, lambda: _check_device(case))
    others = elsewhere.cores() if case.device == "cpu" else None
    for name, error in failed.items():
        rows[name].status = calls.name_failure(error)
    units = OPS[case.op].floor[case.mode]
    flop = units * 2 * i.kept * case.head.hidden * case.head.vocab
    for name, t in times.items():
        row = rows[name]
        row.median_ms, row.p20_ms, row.p80_ms, row.samples, row.repeats = t.median, t.p20, t.p80, t.samples, t.repeats
        row.others = others
        if units:
            row.tflops = flop / t.median / 1e9
        if FLOOR in times:
            row.floor_ratio = t.median / times[FLOOR].median


def _noted(prepare: timing.Prepare, name: str, note: Callable[[str], None]) -> timing.Prepare:
    def run(k: int) -> Callable[[], object]:
        note(name)
        return prepare(k)

    return run


def _check_device(case: Case) -> None:
    """After a kernel that failed on a GPU nothing may work any more: then this process ends, and a new one goes on."""
    if case.device == "cuda":
        try:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            raise SystemExit(BROKEN) from None


def not_run(case: Case, providers: Iterable[Provider], reason: str) -> list[Row]:
    """The rows of a case that nobody tried."""
    return [replace(_blank(case), provider=p.name, status=f"not run: {reason}") for p in providers]


def _blank(case: Case) -> Row:
    return Row(
        op=case.op,
        mode=case.mode,
        shape=case.shape,
        N=case.tokens,
        H=case.head.hidden,
        V=case.head.vocab,
        dtype=case.dtype,
        device=machine.device_name(case.device),
        threads=torch.get_num_threads() if case.device == "cpu" else 0,
        torch=torch.__version__,
        triton=registry.version("triton"),
        python=platform.python_version(),
        sha=machine.commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
