"""Measure cases: check, time and describe all providers of a case side by side, in one process per op.

A separate process isolates what one op leaves behind (compiled code, a broken GPU context) from the next op. If a
provider kills it, a new process resumes without that provider. `python -m bench.suite PROGRESS_FILE` is such a process,
with a `Job` on its standard input.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bench import memory, providers, results, timing, truth
from bench.cases import METRICS, PRODUCTS, Case
from bench.inputs import Inputs
from bench.providers import Provider, describe_failure, prepare_run, run_once
from bench.results import OK, ROOT, Row

BASELINE = "matmul"
BROKEN = 75  # exit code of a process whose GPU no longer answers
# No pool of compiler processes: it would outlive the trial processes, and only little is compiled.
ENV = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def run_case(
    case: Case,
    chosen: Sequence[Provider],
    *,
    metrics: Iterable[str] = METRICS,
    samples: int = timing.SAMPLES,
    files: tuple[Path, ...] = (),
    failed: Mapping[str, str] = MappingProxyType({}),  # providers that killed an earlier process, and how it ended
    note: Callable[[str], None] = lambda provider: None,  # called before a provider is touched
) -> list[Row]:
    """The rows of a case, one per provider. A provider's failure goes into its row, unless it kills this process."""
    rows = {p.name: _blank_row(case, p, failed.get(p.name) or p.refuses(case) or OK) for p in chosen}
    sound = [p for p in chosen if rows[p.name].status == OK]
    if not sound:
        return list(rows.values())
    i, exact = truth.prepare(case)
    for row in rows.values():
        row.kept = i.kept
    with contextlib.ExitStack() as stack:
        children = None
        if case.device == "cpu" and "memory" in metrics:
            children = stack.enter_context(memory.ChildTrials(case, i, files))
        for p in sound:
            note(p.name)
            _try(p, case, i, exact, rows[p.name], children, with_memory="memory" in metrics)
    sound = [p for p in sound if rows[p.name].status == OK]
    if "speed" in metrics:
        _time(sound, case, i, rows, samples, note)
    return list(rows.values())


def _try(
    p: Provider,
    case: Case,
    i: Inputs,
    exact: truth.Truth,
    row: Row,
    children: memory.ChildTrials | None,
    with_memory: bool,
) -> None:
    """Fill in a provider's memory and errors. On a CPU it runs in a child first, so that a crash is contained."""
    try:
        if case.device == "cuda":
            run_once(p, i, case.mode)  # compiles, tunes
            trial, found = memory.measure_on_cuda(p, i, case.mode)
        else:
            trial = children.run(p) if children is not None and not p.bare else memory.Trial()
            found = {} if trial.failure else run_once(p, i, case.mode)
        if trial.peak is not None and with_memory and not p.bare:
            row.peak_mb = trial.peak / 2**20
        row.status = trial.failure or OK
        if not trial.failure and not p.bare:
            verdict = truth.judge(case.op, case.dtype, i, exact, found)
            row.error, row.grad_error, row.status = verdict.error, verdict.grad_error, verdict.reason or OK
    except Exception as error:
        row.status = describe_failure(error)
        _check_device(case)


def _time(
    sound: Sequence[Provider],
    case: Case,
    i: Inputs,
    rows: Mapping[str, Row],
    samples: int,
    note: Callable[[str], None],
) -> None:
    """Fill in the times of the providers that passed, interleaved."""
    gc.collect()
    copies = [i, i.copy()]
    load = timing.OtherLoad()
    runs = {p.name: _noted(prepare_run(p, copies, case.mode), p.name, note) for p in sound}
    times, failed = timing.time_interleaved(runs, case.device, samples, lambda: _check_device(case))
    others = load.cores() if case.device == "cpu" else None
    for name, error in failed.items():
        rows[name].status = describe_failure(error)
    units = PRODUCTS[case.op][case.mode]
    flop = units * 2 * i.kept * case.head.hidden * case.head.vocab
    for name, t in times.items():
        row = rows[name]
        row.median_ms, row.p20_ms, row.p80_ms, row.samples, row.repeats = t.median, t.p20, t.p80, t.samples, t.repeats
        row.others = others
        if units:
            row.tflops = flop / t.median / 1e9
        if BASELINE in times:
            row.matmul_ratio = t.median / times[BASELINE].median


def _noted(prepare: timing.Prepare, name: str, note: Callable[[str], None]) -> timing.Prepare:
    def run(k: int) -> Callable[[], object]:
        note(name)
        return prepare(k)

    return run


def _check_device(case: Case) -> None:
    """After a failed kernel the GPU context may be unusable: then this process ends, and a new one resumes."""
    if case.device == "cuda":
        try:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            raise SystemExit(BROKEN) from None


def _blank_row(case: Case, p: Provider, status: str) -> Row:
    return Row(
        op=case.op,
        mode=case.mode,
        shape=case.shape,
        N=case.tokens,
        H=case.head.hidden,
        V=case.head.vocab,
        dtype=case.dtype,
        provider=p.name,
        status=status,
        version=providers.version(p.package),
        device=results.device_name(case.device),
        threads=torch.get_num_threads() if case.device == "cpu" else 0,
        torch=torch.__version__,
        triton=providers.version("triton"),
        python=platform.python_version(),
        sha=results.commit(),
        date=results.now(),
    )


@dataclass
class Job:
    """Cases for one process to work through, in order."""

    cases: list[Case]
    providers: list[str]  # empty: all
    metrics: list[str]
    samples: int
    threads: int
    folder: str  # of the CSVs; empty: none are written
    deadline: float  # Unix time after which no case is started; 0: none
    budget: float  # seconds, for the status of rows that were not run
    files: list[str] = field(default_factory=list)  # --with
    failed: dict[str, dict[str, str]] = field(default_factory=dict)  # case -> provider -> how the process ended

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        values: dict[str, Any] = json.loads(text)
        return Job(**{**values, "cases": [Case(**c) for c in values["cases"]]})


@dataclass
class Progress:
    """Progress of a process and the provider that it runs now, in a file that outlives it."""

    path: Path
    done: int = 0  # cases
    wrong: int = 0  # wrong results of our backends
    provider: str = ""

    def note(self, provider: str = "") -> None:
        self.provider = provider
        state = {"done": self.done, "wrong": self.wrong, "provider": provider}
        self.path.write_text(json.dumps(state), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Progress:
        return Progress(path, **json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else Progress(path)


def run_job(job: Job) -> int:
    """Run the job; return the number of wrong results of our backends."""
    ops = list(dict.fromkeys(case.op for case in job.cases))
    return sum(_supervise(replace(job, cases=[c for c in job.cases if c.op == op], failed={})) for op in ops)


def _supervise(job: Job) -> int:
    """Run the cases of one op in a process. Whenever a provider kills it, start a new one for the remaining cases."""
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / "progress"
        while job.cases:
            path.unlink(missing_ok=True)
            command = [sys.executable, "-m", "bench.suite", str(path)]
            code = subprocess.run(command, input=job.to_json(), text=True, cwd=ROOT, env=ENV, check=False).returncode
            progress = Progress.read(path)
            wrong += progress.wrong
            job.cases = job.cases[progress.done :]
            if code == 0 or not job.cases:
                break
            how = "broke the GPU's context" if code == BROKEN else memory.describe_exit(code)
            if not progress.provider:  # it died between providers, so none can be excluded: a retry would loop forever
                print(f"{job.cases[0]}: the process {how}; the rest of this op is left out", file=sys.stderr)
                return wrong + 1
            job.failed.setdefault(str(job.cases[0]), {})[progress.provider] = how
            print(f"{job.cases[0]}: {progress.provider} {how}; resuming without it", file=sys.stderr)
    return wrong


def work(job: Job, progress: Progress) -> None:
    """Measure a job's cases in this process."""
    torch.set_num_threads(job.threads or torch.get_num_threads())
    providers.load(tuple(Path(f) for f in job.files))
    for case in job.cases:
        progress.note()
        torch._dynamo.reset()  # compile every case for its shapes, independently of earlier cases
        chosen = [p for p in providers.providers_of(case.op) if not job.providers or p.name in job.providers]
        rows = _run_or_skip(case, chosen, job, progress)
        own = {p.name for p in chosen if p.package == "sgcd-kernels"}
        progress.wrong += sum(row.status.startswith(("wrong", "threw")) for row in rows if row.provider in own)
        if job.folder:
            results.append(rows, Path(job.folder))
        _show(case, rows)
        progress.done += 1
        progress.note()


def _run_or_skip(case: Case, chosen: Sequence[Provider], job: Job, progress: Progress) -> list[Row]:
    """The rows of one case. If it cannot be set up, or the budget is spent, they hold the reason."""
    if job.deadline and time.time() > job.deadline:
        reason = f"the budget of {job.budget:.0f} s was spent"
    else:
        files, failed = tuple(Path(f) for f in job.files), job.failed.get(str(case), {})
        try:
            return run_case(
                case,
                chosen,
                metrics=job.metrics,
                samples=job.samples,
                files=files,
                failed=failed,
                note=progress.note,
            )
        except Exception as error:
            reason = f"its inputs or their fp64 truth: {describe_failure(error)}"
    return [_blank_row(case, p, f"not run: {reason}") for p in chosen]


def _show(case: Case, rows: Sequence[Row]) -> None:
    """Print a case's rows."""
    print(f"\n{case}", flush=True)
    for row in rows:
        cells = [
            f"{row.median_ms:10.2f} ms [{row.p20_ms:.2f}, {row.p80_ms:.2f}]" if row.median_ms is not None else "",
            f"{row.matmul_ratio:6.2f} x matmul" if row.matmul_ratio is not None else "",
            f"{row.peak_mb:7.0f} MB" if row.peak_mb is not None else "",
            f"error {row.error:.0e}" if row.error is not None else "",
            f"grad {row.grad_error:.0e}" if row.grad_error is not None else "",
            "" if row.status == OK else row.status,
        ]
        print(f"  {row.provider:15}", "  ".join(cell for cell in cells if cell), flush=True)


if __name__ == "__main__":
    work(Job.from_json(sys.stdin.read()), Progress(Path(sys.argv[1])))
