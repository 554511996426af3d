"""What only the C++ scoring pass has: threads, packed groups of tokens, and a path for every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sgcd_kernels import backend_status, linear_divergence
from tests.sgcd_kernels.backends.cases import Case, case

STATUS = backend_status()["cpp"]
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason)]
ROOT = Path(__file__).resolve().parents[4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(c: Case, **extras: Any) -> dict[str, torch.Tensor]:
    got = linear_divergence(c.x, c.w, c.y, c.t, features=("jsd", "tv"), beta=0.3, impl="cpp", **extras)
    return {k: v for k, v in got._asdict().items() if v is not None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [0.01, 2.0, 30.0])
def test_equal_heads_give_exactly_zero(dtype: torch.dtype, std: float) -> None:
    c = case(70, 24, 5000, dtype, std)
    got = run(Case(c.x, c.w, c.y, c.x.clone()))
    for name in ("reverse_kl", "forward_kl", "jsd", "tv"):
        assert (got[name] == 0).all(), name
    assert (got["bhattacharyya"] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    c = case(150, 40, 9000, dtype)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        results.append(run(c))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_more_tokens_than_are_packed_at_one_time() -> None:
    c = case(6300, 512, 70, torch.float32)
    got = run(c)
    for rows in (slice(0, 50), slice(6140, 6170), slice(6250, 6300)):
        alone = run(Case(c.x[rows], c.w, c.y[rows], c.t[rows]))
        for name, value in alone.items():
            torch.testing.assert_close(got[name][rows], value, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_every_path_gives_the_same_values(isa: str) -> None:
    """Each path that this machine can also run, in a process of its own (the choice is made once)."""
    code = (
        "import torch\n"
        "from tests.sgcd_kernels.backends.cases import case, exact\n"
        "from sgcd_kernels import backend_status, linear_divergence, linear_logprob\n"
        "print(backend_status()['cpp'].reason.split()[1])\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    c = case(70, 33, 3000, dtype); want = exact(c, softcap=8.0)\n"
        "    got = linear_divergence(c.x, c.w, c.y, c.t, features=('jsd', 'tv'), beta=0.3, softcap=8.0, impl='cpp')\n"
        "    for name, value in want.items():\n"
        "        torch.testing.assert_close(getattr(got, name).double(), value, rtol=1e-5, atol=3e-6)\n"
        "    x, w = c.x.clone().requires_grad_(), c.w.clone().requires_grad_()\n"
        "    s = linear_logprob(x, w, c.y, impl='cpp'); (s.logp.sum() + s.entropy.sum()).backward()\n"
        "    a, b = c.x.clone().requires_grad_(), c.w.clone().requires_grad_()\n"
        "    s = linear_logprob(a, b, c.y, impl='torch'); (s.logp.sum() + s.entropy.sum()).backward()\n"
        "    tol = 2e-2 if dtype == torch.bfloat16 else 1e-4\n"
        "    torch.testing.assert_close(x.grad, a.grad, rtol=tol, atol=tol)\n"
        "    torch.testing.assert_close(w.grad, b.grad, rtol=tol, atol=tol)\n"
    )
    environment = os.environ | {"SGCD_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
    has = STATUS.reason.split()[1]
    assert done.stdout.strip() == min(isa, has, key=paths.index)
