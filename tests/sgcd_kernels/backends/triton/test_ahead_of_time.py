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
ROOT = Path(__file__).resolve().parents[4]
CODE = """
import json, sys
from bench.aot import MASTER, OPTIONS, UNEVEN, cases, compile_case
kernel, arch = sys.argv[1] or None, int(sys.argv[2])
some = {("head_stats", MASTER, UNEVEN, False), ("logprob_grad", MASTER, UNEVEN, False)}
for call in cases(kernel, arch):
    if kernel or call.plain or (call.kernel, call.mix, call.how, call.unaligned) in some:
        row = compile_case(call)
        print(json.dumps([row.line(), row.faults()]), flush=True)
"""
KERNELS = [
    "head_stats",
    "pair_stats",
    "own_pair_stats",
    "mixture_stats",
    "chosen_logits",
    "logprob_grad",
    "distill_grad",
    "scan",
]


def compile_all(kernel: str, arch: int) -> list[str]:
    """The lines of the table; some of each kernel where none is named."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE, kernel, str(arch)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    print(*(line for line, _ in rows), sep="\n")
    faulty = [f"{faults}: {line}" for line, faults in rows if faults]
    assert rows and not faulty, "\n".join(faulty)
    return [line for line, _ in rows]


def test_plain_calls_and_master_weights_on_hopper() -> None:
    lines = "\n".join(compile_all("", 90))
    assert all(f"| {kernel}" in lines for kernel in KERNELS) and "bf16/fp32" in lines


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_call_of_every_configuration(kernel: str, arch: int) -> None:
    """All mixes of dtypes, unaligned rows, masked tokens, partly filled tiles, options, a teacher's own weight."""
    compile_all(kernel, arch)
