"""The raw operators under anything at all: a ValueError or a result, never a crash; and what they may allocate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgcd_kernels import backend_status, backends, linear_logprob
from sgcd_kernels.cpp import extension

STATUS = backend_status()["cpp"]
usable = pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason)
ROOT = Path(__file__).resolve().parents[2]

FUZZ = r"""
import random, sys, time
import torch
from sgcd_kernels import backend_status
assert backend_status()["cpp"].usable
ops, r = torch.ops.sgcd_kernels, random.Random(int(sys.argv[1]))
FLOATS = [torch.float32] * 6 + [torch.bfloat16] * 4 + [torch.float16, torch.float64, torch.int64, torch.bool]

def tensor(shape, dtypes):
    dtype = r.choice(dtypes)
    shape = [max(0, s + r.choice([0] * 30 + [-1, 1])) for s in shape]
    if r.random() < 0.03:
        shape = shape[1:] if r.random() < 0.5 else [1, *shape]
    x = torch.randn(shape) * r.choice([1, 1, 1, 30, 1e30])
    if x.numel() and r.random() < 0.05:
        x.view(-1)[r.randrange(x.numel())] = r.choice([float("nan"), float("inf"), -float("inf")])
    x = x.to(dtype)
    how = r.random()
    if how < 0.03 and x.dim() == 2:
        return x.t().contiguous().t()
    if how < 0.05 and x.dim() == 2:
        return x[:1].expand(max(1, x.shape[0]), x.shape[1])
    if how < 0.06 and x.dim():
        return x[::2]
    if how < 0.065:
        return torch.empty(1, dtype=dtype).expand([2**33] + [1] * max(0, x.dim() - 1))  # huge, and holds nothing
    if how < 0.07:
        return x.to("meta")
    if how < 0.075:
        return x.to_sparse() if dtype.is_floating_point and x.dim() else x
    return x

def maybe(x, chance=0.4):
    return x if r.random() < chance else None

def integers(n, low, high, chance=0.03):
    x = torch.randint(low, max(high, low + 1), (max(0, n + r.choice([0] * 30 + [-1, 1])),))
    if x.numel() and r.random() < chance:
        x[r.randrange(len(x))] = r.choice([-1, -100, 2**31, 2**31 - 1, -(2**63), 2**63 - 1, high])
    return x.int() if r.random() < 0.02 else x

def number(usual):
    return r.choice([usual] * 20 + [0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30])

done, limit = [0, 0], time.time() + float(sys.argv[3])
for _ in range(int(sys.argv[2])):
    n, h, v = r.choice([0, 1, 2, 3, 63, 64, 65, 70]), r.choice([1, 2, 3, 8, 33]), r.choice([1, 2, 63, 64, 65, 130])
    f = FLOATS if r.random() < 0.2 else [r.choice(FLOATS[:10])]
    rows = maybe(integers(r.randrange(0, n + 2), 0, n), 0.3)
    m = n if rows is None else len(rows)
    f32 = [torch.float32] * 40 + FLOATS
    head = lambda: (tensor([n, h], f), tensor([v, h], f), maybe(tensor([v], f32)))
    each = lambda: tensor([m], f32)
    shared = (maybe(each()), r.choice([0.0, 5.0, number(5.0)]))
    needs = [r.random() < 0.6 for _ in range(r.choice([3] * 30 + [2]))]
    calls = {
        "head_stats": lambda: (*head(), rows, integers(m, 0, v, 0.3), *shared),
        "pair_stats": lambda: (*head(), *head(), rows, integers(m, 0, v, 0.3), *shared),
        "mixture_stats": lambda: (*head(), *head(), rows, tensor([4, m], f32), *shared, number(0.5), True, r.random() < 0.5),
        "bare_walk": lambda: (*head()[:2], maybe(tensor([n, h], f))),
        "logprob_grads": lambda: (*head(), rows, integers(m, 0, v, 0.3), *shared, each(), each(), each(),
                                  *((each(), each()) if r.random() < 0.4 else (maybe(each(), 0.05), None)), needs, r.random() < 0.3),
        "distill_grads": lambda: (*head(), *head(), rows, *shared, each(), each(), each(), each(), number(0.5), r.choice([0, 1, 2, 2, 3, -1]), needs),
    }
    name = r.choice(list(calls))
    try:
        arguments = calls[name]()
    except (RuntimeError, TypeError):
        continue  # the generator asked torch for something that does not exist
    try:
        getattr(ops, name)(*arguments)
        done[0] += 1
    except (ValueError, NotImplementedError, RuntimeError):
        done[1] += 1
    if time.time() > limit:
        break
print(*done)
"""


@usable
def test_ten_thousand_calls_and_no_crash() -> None:
    command = [sys.executable, "-X", "faulthandler", "-c", FUZZ, "0", "10000", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    worked, refused = map(int, done.stdout.split())
    assert worked > 1000 and refused > 1000
    assert worked + refused > 9000


PEAK = r"""
import resource, sys, torch
import sgcd_kernels as s
n, h, v = map(int, sys.argv[2:])
torch.manual_seed(0)
x, t, w, y = torch.randn(n, h).bfloat16(), torch.randn(n, h).bfloat16(), torch.randn(v, h).bfloat16(), torch.randint(v, (n,))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
ops = {
    "score": lambda x, t, w, y: s.linear_divergence(x, w, y, t, impl="cpp"),
    "loss": lambda x, t, w, y: s.linear_policy_loss(x.requires_grad_(), w.requires_grad_(), y, t[:, 0].float(), loss_type="dapo", impl="cpp"),
}
ops[sys.argv[1]](x[:70].clone(), t[:70].clone(), w[:70].clone(), y[:70] % 70)  # what the first call of anything loads
before = peak()
ops[sys.argv[1]](x, t, w, y)
print(peak() - before)
"""


@usable
@pytest.mark.parametrize("op", ["score", "loss"])
@pytest.mark.parametrize("shape", [(8000, 64, 4000), (600, 64, 40000)])
def test_peak_memory(op: str, shape: tuple[int, int, int]) -> None:
    """Seen by the operating system; the logits of either shape are 100-130 MB, twice that for a pair."""
    n, h, v = shape
    command = [sys.executable, "-c", PEAK, op, *map(str, shape)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    gradients = (6 * n * h + 2 * v * h) / 2**20 if op == "loss" else 0
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
        ({"torch": torch.__version__}, ["_C.so"], "does not load"),
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
    broken = backends.Backend("sgcd_kernels.cpp.ops", lambda: said, extension.refuses)
    monkeypatch.setitem(backends._BACKENDS, "cpp", broken)
    with pytest.raises(ValueError, match=reason):
        linear_logprob(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), impl="cpp")
    linear_logprob(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]))  # auto goes on with torch
