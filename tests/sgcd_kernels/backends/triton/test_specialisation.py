"""What Triton would compile for the launches of real ops: here without a GPU, in a process where it does not interpret.

A launch ends where Triton has its key, by which it finds a compiled kernel or compiles one.
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
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import jit
from sgcd_kernels.backends.protocol import DistillSaved, DivergenceOptions
from sgcd_kernels.backends.triton import distill, divergence, gradients, launch, logprob, topk
from sgcd_kernels.core.lm_head import LMHead, Needs, Projection
from sgcd_kernels.core.statistics import LogprobValues

backend, keys = CUDABackend(GPUTarget("cuda", 90, 32)), set()

def run(self, *args, grid, warmup, **kwargs):
    bind = jit.create_function_from_signature(self.signature, self.params, backend)
    _, specialization, options = bind(*args, **kwargs)
    keys.add((self.fn.__name__, str(specialization), str(options)))

jit.JITFunction.run = run
launch.major_of = lambda device: 9
gradients.WORKSPACE_BYTES, gradients.VOCAB_MULTIPLE, topk.CHUNK_BYTES = 300 << 10, 128, 460 << 10

def rows(count, width, stride, start):
    return torch.zeros(count * stride + start, dtype=torch.float16)[start:].view(count, stride)[:, :width]

def launches(n, vocab, width, strides, starts, masked):
    keys.clear()
    x, w, t = (rows(c, width, s, b) for c, s, b in zip((2 * n, vocab, 2 * n), strides, starts))
    counted = torch.arange(n) * 2 if masked else None
    head = LMHead(w, temperature=torch.ones(2 * n if masked else n))
    p, q = (Projection(h if masked else h[:n], head, counted) for h in (x, t))
    numbers, targets = torch.zeros(n), torch.zeros(n, dtype=torch.long)
    needs = Needs(True, True, False)
    logprob.logprob_forward(p, targets)
    values, upstream = LogprobValues(None, lse=numbers, lse_low=numbers), LogprobValues(numbers)
    logprob.logprob_backward(p, targets, values, upstream, needs)
    divergence.divergence_forward(p, q, targets, DivergenceOptions(("jsd", "tv"), 0.5, 3))
    saved = DistillSaved._make([numbers] * len(DistillSaved._fields))
    distill.distill_backward(p, q, ("jsd", 0.5), saved, numbers, needs)
    return sorted(keys)

print(json.dumps([launches(*call) for call in json.loads(sys.argv[1])]))
"""


def launches(*calls: tuple[object, ...]) -> list[list[list[str]]]:
    """Of each call the kernels that would be compiled: names, what is known of their arguments, options."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(calls)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[list[str]]] = json.loads(done.stdout)
    return found


EVEN, STARTS = (64, 64, 64), (0, 0, 0)


def test_no_number_of_tokens_compiles_anew() -> None:
    """Whatever number is left for the last chunk; with vocab ids that fill no tile."""
    for masked in (False, True):
        first, *others = launches(*((n, 321, 64, EVEN, STARTS, masked) for n in (1000, 1001, 1013, 1407)))
        assert {name for name, *_ in first} >= {"head_stats_kernel", "chosen_logits_kernel", "distill_grad_kernel"}
        assert len(first) == len({name for name, *_ in first}) + 2  # the last chunks' vocab ids fill no tile
        assert all(other == first for other in others)


def test_unaligned_rows_compile_one_kernel() -> None:
    """Whichever of H, strides and addresses 16 does not divide."""
    first, *others = launches(
        (300, 320, 63, (64, 64, 64), STARTS, True),
        (300, 320, 63, (63, 64, 64), STARTS, True),
        (300, 320, 63, (64, 65, 63), (1, 3, 0), True),
    )
    assert all(other == first for other in others)
    even, wide = launches((300, 320, 64, EVEN, STARTS, True), (300, 320, 64, (65, 64, 64), STARTS, True))
    assert even != wide != first  # which also differ in H: 63 columns do not fill the steps
