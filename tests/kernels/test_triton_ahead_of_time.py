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
import json, sys
from bench.aot import SHARED_LIMIT, cases, compile_case
kernel, dtype, arch, plain = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "plain"
for call in cases(kernel, arch, dtype):
    usual = call.awkward == (kernel == "chosen_logits") and call.own == (kernel == "own_pair_stats")
    if plain and not (usual and call.first):
        continue
    row = compile_case(call)
    print(json.dumps([row.line(), row.matrix, row.stack + row.spills, row.shared <= SHARED_LIMIT[arch]]))
"""
KERNELS = [
    "head_stats",
    "pair_stats",
    "own_pair_stats",
    "mixture_stats",
    "chosen_logits",
    "logprob_grad",
    "distill_grad",
]


def compile_all(kernel: str, dtype: str, arch: int, what: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE, kernel, dtype, str(arch), what]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for line, matrix, stack, fits in rows:
        print(line)
        assert matrix > 0, f"no matrix instructions: {line}"
        assert fits, f"too much shared memory: {line}"
        assert stack == 0, f"stack or spills: {line}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_plain_call_on_hopper(kernel: str) -> None:
    compile_all(kernel, "bf16", 90, "plain")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_call_of_every_configuration(kernel: str, dtype: str, arch: int) -> None:
    """With and without masked tokens, entropy gradients, uneven words, bias, softcap, temperature, an own teacher."""
    compile_all(kernel, dtype, arch, "all")
