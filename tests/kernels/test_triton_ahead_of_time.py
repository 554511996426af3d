"""Every kernel with every configuration of the tables compiles for real GPUs, without one: the ahead-of-time gate.

In processes of their own, because here Triton interprets. `python -m bench.aot` prints the same as a table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
CODE = """
import dataclasses, json, sys
from bench.aot import MATRIX, SHARED_LIMIT, cases, compile_case
kernel, dtype, arch, everything = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
for case in cases(kernel, arch, dtype):
    if everything and not case[-1]:
        continue
    row = compile_case(*case, everything=everything)
    print(json.dumps(dataclasses.asdict(row) | {"line": row.line(), "limit": SHARED_LIMIT[arch]}))
"""
KERNELS = ["head_stats", "pair_stats", "mixture_stats", "logprob_grad", "distill_grad"]


def compile_all(kernel: str, dtype: str, arch: int, everything: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE, kernel, dtype, str(arch), str(everything)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for row in rows:
        print(row["line"])
        assert row["matrix"] > 0, f"no matrix instructions: {row['line']}"
        assert row["shared"] <= row["limit"], row["line"]
        if not everything:  # options cost registers; the plain call is the hot one
            assert row["stack"] == 0 and row["spills"] == 0, row["line"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_plain_call_on_hopper(kernel: str) -> None:
    compile_all(kernel, "bf16", 90, False)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration(kernel: str, dtype: str, arch: int) -> None:
    compile_all(kernel, dtype, arch, False)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kernel", KERNELS)
def test_with_every_option(kernel: str, arch: int) -> None:
    compile_all(kernel, "bf16", arch, True)
