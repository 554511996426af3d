"""Starts a process for each op, and another one to go on with where a provider has killed it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.job import Job, Progress
from bench.memory import name_death
from bench.runner import BROKEN

ROOT = Path(__file__).resolve().parents[1]
# No pool of compiler processes: it would outlive the trial processes, and there is little to compile.
ENV = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def run(job: Job) -> int:
    """Work through the job; give the number of wrong answers of our own."""
    ops = list(dict.fromkeys(case.op for case in job.cases))
    return sum(_run_op(replace(job, cases=[c for c in job.cases if c.op == op], failed={})) for op in ops)


def _run_op(job: Job) -> int:
    bad = 0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        while job.cases:
            progress = Progress(Path(folder) / "progress")
            progress.write(0)
            command = [sys.executable, "-m", "bench.worker", str(progress.path)]
            code = subprocess.run(command, input=job.dump(), text=True, cwd=ROOT, env=ENV, check=False).returncode
            done, provider, wrong = progress.read()
            bad += wrong
            job.cases = job.cases[done:]
            if code == 0 or not job.cases:
                break
            how = "broke the GPU's context" if code == BROKEN else name_death(code)
            if not provider:  # it died between providers: nobody to blame, and trying again would not end
                print(f"{job.cases[0]}: the process {how}; the rest of this op is left out", file=sys.stderr)
                return bad + 1
            job.failed.setdefault(str(job.cases[0]), {})[provider] = how
            print(f"{job.cases[0]}: {provider} {how}; going on without it", file=sys.stderr)
    return bad
