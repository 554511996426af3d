"""The C++ scoring pass against the reference in fp64, at awkward shapes and values, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sgcd_kernels import backend_status, linear_divergence, linear_logprob, reference
from tests.kernels.cpp_inputs import Case, case, exact

STATUS = backend_status()["cpp"]
pytestmark = pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason)
ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (1, 3, 2), (3, 5, 63), (64, 8, 64), (65, 33, 65), (130, 64, 1000), (17, 7, 4133)]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill all fresh memory, scratch inside the operators too, with NaN (bytes with 255, NaN in bf16)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def run(c: Case, **extras: Any) -> dict[str, torch.Tensor]:
    got = linear_divergence(c.x, c.w, c.y, c.t, features=("jsd", "tv"), beta=0.3, impl="cpp", **extras)
    return {k: v for k, v in got._asdict().items() if v is not None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_that_of_fp32(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Not that of the dtype: half inputs are multiplied exactly and summed in fp32."""
    c = case(*shape, dtype)
    got, want, plain = run(c), exact(c), exact(c, torch.float32)
    for name, value in want.items():
        error, allowed = (got[name] - value).abs().max(), (plain[name] - value).abs().max()
        assert error <= 2 * allowed + 3e-7 * (1 + value.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [{"softcap": 3.0}, {"temperature": 0.6}, {"temperature": "token", "softcap": 30.0}])
def test_bias_softcap_and_temperature(extras: dict[str, Any], dtype: torch.dtype) -> None:
    c = case(70, 12, 333, dtype, std=4.0)
    extras = extras | {"bias": torch.randn(333)}
    if extras.get("temperature") == "token":
        extras["temperature"] = torch.rand(70) + 0.5
    got, want = run(c, **extras), exact(c, **extras)
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=2e-5, atol=4e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_teacher_of_its_own_and_a_mixture_of_dtypes() -> None:
    c = case(40, 12, 200, torch.bfloat16)
    t, tw = torch.randn(40, 7), torch.randn(200, 7)
    got = linear_divergence(c.x, c.w, c.y, t, tw, impl="cpp")
    p, q = reference.logits(c.x.double(), c.w.double()), reference.logits(t.double(), tw.double())
    torch.testing.assert_close(got.reverse_kl.double(), reference.kl(p, q), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.teacher_entropy.double(), reference.logprob(q, c.y)[1], rtol=1e-5, atol=1e-5)


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


def test_rows_of_strided_inputs() -> None:
    c = case(40, 16, 300, torch.float32)
    wide, heavy = torch.randn(40, 50), torch.randn(300, 30)
    wide[:, 3:19], heavy[:, 5:21] = c.x, c.w
    got = linear_logprob(wide[:, 3:19], heavy[:, 5:21], c.y, impl="cpp")
    assert all(torch.equal(a, b) for a, b in zip(got, linear_logprob(c.x, c.w, c.y, impl="cpp")))
    with pytest.raises(ValueError, match="reads rows of weight as they lie"):
        linear_logprob(c.x, c.w.t().contiguous().t(), c.y, impl="cpp")


@pytest.mark.parametrize("level", [-1e30, -3e4, 3e4])
def test_rows_at_an_extreme_level(level: float) -> None:
    bias = torch.full((200,), level)
    stats = linear_logprob(torch.zeros(2, 3), torch.randn(200, 3), torch.tensor([5, 199]), bias=bias, impl="cpp")
    assert stats.logp.tolist() == pytest.approx([-torch.tensor(200.0).log().item()] * 2, rel=1e-5)


def test_a_peaked_row_is_certain() -> None:
    """Embeddings copied into the head, as tied weights give them."""
    x = torch.nn.functional.normalize(torch.randn(50, 16), dim=1)
    stats = linear_logprob(x * 300, x, torch.arange(50), impl="cpp")
    assert (stats.logp == 0).all()
    assert (stats.entropy.abs() < 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_breaks_only_itself(value: float, dtype: torch.dtype) -> None:
    c = case(70, 5, 300, dtype)
    clean = run(c)
    c.t[3, 0] = value
    got, others = run(c), torch.arange(70) != 3
    assert got["reverse_kl"][3].isnan()
    assert got["student_logp"][3] == clean["student_logp"][3]
    assert all(torch.equal(got[name][others], clean[name][others]) for name in got)


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_every_path_gives_the_same_values(isa: str) -> None:
    """Each path that this machine can also run, in a process of its own (the choice is made once)."""
    code = (
        "import torch\n"
        "from tests.kernels.cpp_inputs import case, exact\n"
        "from sgcd_kernels import backend_status, linear_divergence, linear_logprob\n"
        "print(backend_status()['cpp'].reason)\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    c = case(70, 33, 500, dtype); want = exact(c, softcap=8.0)\n"
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
    assert "path" in done.stdout
