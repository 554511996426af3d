"""A process that works through cases: `python -m bench.worker PROGRESS_FILE` with a job on its standard input.

Each op gets its own, so that what one leaves behind (compiled code, a broken GPU context) is no other's trouble.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import calls, registry, rows, runner
from bench.cases import Case
from bench.job import Job, Progress
from bench.registry import Provider


def main(arguments: Sequence[str]) -> int:
    job, progress = Job.load(sys.stdin.read()), Progress(Path(arguments[0]))
    torch.set_num_threads(job.threads or torch.get_num_threads())
    files = tuple(Path(f) for f in job.files)
    registry.load(files)
    bad = 0
    for number, case in enumerate(job.cases):
        progress.write(number, bad=bad)
        torch._dynamo.reset()  # every case is compiled for its own shapes, as if it were the only one
        chosen = [p for p in registry.of(case.op) if not job.providers or p.name in job.providers]
        found = take(case, chosen, job, files, number, progress, bad)
        bad += sum(row.status.startswith(("wrong", "threw")) for row in found if _ours(row, chosen))
        if job.folder:
            rows.append(rows.path_of(found[0], Path(job.folder)), found)
        show(case, found)
        progress.write(number + 1, bad=bad)
    return 0


def take(
    case: Case,
    chosen: list[Provider],
    job: Job,
    files: tuple[Path, ...],
    number: int,
    progress: Progress,
    bad: int,
) -> list[rows.Row]:
    """The rows of one case; of one that cannot be set up, or comes too late, rows that say so."""
    if job.deadline and time.time() > job.deadline:
        return runner.not_run(case, chosen, f"the budget of {job.budget:.0f} s was spent")
    try:
        return runner.run_case(
            case,
            chosen,
            metrics=job.metrics,
            samples=job.samples,
            files=files,
            failed=job.failed.get(str(case), {}),
            note=lambda provider: progress.write(number, provider, bad),
        )
    except Exception as error:
        return runner.not_run(case, chosen, f"its inputs or their fp64 truth: {calls.name_failure(error)}")


def _ours(row: rows.Row, chosen: list[Provider]) -> bool:
    return any(p.name == row.provider and p.package == "sgcd-kernels" for p in chosen)


def show(case: Case, found: list[rows.Row]) -> None:
    """A case's rows on the terminal."""
    print(f"\n{case}", flush=True)
    for row in found:
        cells = [
            f"{row.median_ms:10.2f} ms [{row.p20_ms:.2f}, {row.p80_ms:.2f}]" if row.median_ms is not None else "",
            f"{row.floor_ratio:6.2f} x floor" if row.floor_ratio is not None else "",
            f"{row.peak_mb:7.0f} MB" if row.peak_mb is not None else "",
            f"error {row.error:.0e}" if row.error is not None else "",
            f"grad {row.grad_error:.0e}" if row.grad_error is not None else "",
            "" if row.status == rows.OK else row.status,
        ]
        print(f"  {row.provider:14}", "  ".join(cell for cell in cells if cell), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
