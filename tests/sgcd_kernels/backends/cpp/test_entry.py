"""The raw operators under anything at all: a ValueError or a result, never a crash; and what they may allocate."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgcd_kernels import backend_status, linear_logprob
from sgcd_kernels.backends import registry
from sgcd_kernels.backends.cpp import extension
from sgcd_kernels.backends.cpp.sources import digest

STATUS = backend_status()["cpp"]
usable = pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason)
ROOT = Path(__file__).resolve().parents[4]


@usable
@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_argument_crashes_an_operator(cases: int) -> None:
    command = [sys.executable, "-X", "faulthandler", str(Path(__file__).parent / "fuzz.py"), str(cases)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [line.split() for line in done.stdout.splitlines()]
    assert len(counts) == 9 + hasattr(torch.ops.sgcd_kernels, "matmul_sweep")  # in a build for the benchmark
    if cases >= 10_000:  # fewer need not meet every operator with both good and bad input
        assert all(int(worked) > 0 and int(refused) > 0 for _, worked, refused in counts)
    assert sum(int(worked) + int(refused) for _, worked, refused in counts) > 0.8 * cases


PEAK = r"""
import resource, sys, torch
import sgcd_kernels as s
n, h, v = map(int, sys.argv[2:])
torch.manual_seed(0)
x, t, w = (torch.randn(k, h, dtype=torch.bfloat16) for k in (n, n, v))  # fp32 ones in between would be a peak too
y = torch.randint(v, (n,))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
ops = {
    "score": lambda x, t, w, y: s.linear_divergence(x, w, y, t, impl="cpp"),
    "loss": lambda x, t, w, y: s.linear_policy_loss(
        x.requires_grad_(), w.requires_grad_(), y, t[:, 0].float(), loss_type="dapo", impl="cpp"
    ),
}
ops[sys.argv[1]](x[:70].clone(), t[:70].clone(), w[:70].clone(), y[:70] % 70)  # what the first call of anything loads
before = peak()
ops[sys.argv[1]](x, t, w, y)
print(peak() - before)
"""


@usable
@pytest.mark.parametrize("op", ["score", "loss"])
@pytest.mark.parametrize("shape", [(8000, 64, 4000), (600, 64, 40000), (16_384, 1024, 512)])
def test_peak_memory(op: str, shape: tuple[int, int, int]) -> None:
    """Seen by the operating system. Logits of the first two are 100-130 MB, twice that for a pair; hidden's gradient is
    summed in fp32, 64 MB of the last."""
    n, h, v = shape
    command = [sys.executable, "-c", PEAK, op, *map(str, shape)]
    blocks = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # else glibc keeps what was freed, more or less of it
    done = subprocess.run(command, cwd=ROOT, env=os.environ | blocks, capture_output=True, text=True, check=True)
    gradients = (4 * n * h + 2 * v * h) / 2**20 if op == "loss" else 0
    assert float(done.stdout) <= 64 + gradients


@usable
def test_status_names_the_path() -> None:
    assert any(f"{path} path" in STATUS.reason for path in ("amx", "avx512_bf16", "avx512", "avx2", "portable"))


@usable
def test_auto_takes_it_on_the_cpu_and_leaves_fp64_to_torch() -> None:
    assert linear_logprob(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])).logp.dtype == torch.float32
    x, w, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1])
    assert linear_logprob(x, w, y).logp.dtype == torch.float64
    with pytest.raises(ValueError, match="impl is 'cpp', which cannot run logprob_forward here: it takes float32"):
        linear_logprob(x, w, y, impl="cpp")


@pytest.mark.parametrize(
    ("note", "libraries", "reason"),
    [
        ({"reason": "no C++ compiler was found"}, [], "not built: no C\\+\\+ compiler was found"),
        ({}, [], "not built: setup.py has not run"),
        ({"torch": "1.0"}, ["_C.so"], "built for torch 1.0 and this is"),
        ({"torch": torch.__version__, "sources": "of last week"}, ["_C.so"], "csrc/ changed since .* was built"),
        ({"torch": torch.__version__, "sources": digest(extension.SOURCES)}, ["_C.so"], "does not load"),
    ],
)
def test_why_it_is_missing(
    note: dict[str, str], libraries: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in libraries:
        (tmp_path / name).write_text("not a library")
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    monkeypatch.setattr(extension, "_note", lambda: note)
    said = extension.unavailable_reason.__wrapped__()
    broken = dataclasses.replace(registry._BACKENDS["cpp"], unavailable_reason=lambda: said)
    monkeypatch.setitem(registry._BACKENDS, "cpp", broken)
    with pytest.raises(ValueError, match=reason):
        linear_logprob(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), impl="cpp")
    linear_logprob(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]))  # auto goes on with torch
