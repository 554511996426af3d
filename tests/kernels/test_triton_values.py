"""The Triton scoring kernels against the reference in fp64, at awkward shapes and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sgcd_kernels import linear_divergence, linear_logprob, reference
from tests.kernels.cpp_inputs import Case, case, exact
from tests.kernels.triton_device import DEVICE

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (1, 3, 2), (3, 5, 31), (16, 16, 32), (17, 33, 65), (70, 20, 300)]
Stats = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill all fresh memory, scratch and outputs, with NaN: every element must be written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def to_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def run(c: Case, **extras: Any) -> Stats:
    x, w, y, t = (a.to(DEVICE) for a in c)
    extras = {name: to_device(value) for name, value in extras.items()}
    got = linear_divergence(x, w, y, t, features=("jsd", "tv"), beta=0.3, impl="triton", **extras)
    return {k: v.cpu() for k, v in got._asdict().items() if v is not None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_that_of_fp32(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Not that of the dtype: half inputs are multiplied exactly and summed in fp32."""
    c = case(*shape, dtype)
    got, want, plain = run(c), exact(c), exact(c, torch.float32)
    for name, value in want.items():
        error, allowed = (got[name] - value).abs().max(), (plain[name] - value).abs().max()
        assert error <= 2 * allowed + 4e-7 * (1 + value.abs().max()), name


@pytest.mark.parametrize("shape", SHAPES)
def test_one_head_alone(shape: tuple[int, int, int]) -> None:
    c = case(*shape, torch.bfloat16)
    got = linear_logprob(*(a.to(DEVICE) for a in c[:3]), impl="triton")
    z = reference.logits(c.x.double(), c.w.double())
    for mine, want in zip(got, reference.logprob(z, c.y)):
        torch.testing.assert_close(mine.cpu().double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [{"softcap": 3.0}, {"temperature": 0.6}, {"temperature": "token", "softcap": 30.0}])
def test_bias_softcap_and_temperature(extras: dict[str, Any], dtype: torch.dtype) -> None:
    c = case(40, 12, 133, dtype, std=4.0)
    extras = extras | {"bias": torch.randn(133)}
    if extras.get("temperature") == "token":
        extras["temperature"] = torch.rand(40) + 0.5
    got, want = run(c, **extras), exact(c, **extras)
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=2e-5, atol=4e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_of_its_own_and_a_mixture_of_dtypes(dtype: torch.dtype) -> None:
    c = case(40, 12, 100, torch.bfloat16)
    t, tw = torch.randn(40, 7).to(dtype), torch.randn(100, 7).to(dtype)
    x, w, y, tt, ttw = (a.to(DEVICE) for a in (c.x, c.w, c.y, t, tw))
    got = linear_divergence(x, w, y, tt, ttw, features=("tv",), impl="triton")
    p, q = reference.logits(c.x.double(), c.w.double()), reference.logits(t.double(), tw.double())
    torch.testing.assert_close(got.reverse_kl.cpu().double(), reference.kl(p, q), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.tv.cpu().double(), reference.tv(p, q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [0.01, 2.0, 30.0])
@pytest.mark.parametrize("copied", [False, True])
def test_equal_heads_give_exactly_zero(dtype: torch.dtype, std: float, copied: bool) -> None:
    c = case(20, 24, 500, dtype, std)
    x, w, y = (a.to(DEVICE) for a in c[:3])
    other = w.clone() if copied else None
    got = linear_divergence(x, w, y, x.clone(), other, features=("jsd", "tv"), impl="triton")
    for name in ("reverse_kl", "forward_kl", "jsd", "tv"):
        assert (getattr(got, name) == 0).all(), name
    assert (got.bhattacharyya == 1).all()


def test_masked_tokens_are_left_out() -> None:
    c = case(50, 12, 100, torch.float32)
    y = c.y.clone()
    y[::3] = -100
    x = c.x.clone()
    x[::3] = torch.nan
    got = linear_divergence(*(a.to(DEVICE) for a in (x, c.w, y, c.t)), impl="triton")
    keep = y != -100
    want = exact(c)
    assert (got.reverse_kl.cpu()[~keep] == 0).all() and (got.student_logp.cpu()[~keep] == 0).all()
    torch.testing.assert_close(got.reverse_kl.cpu()[keep].double(), want["reverse_kl"][keep], rtol=1e-5, atol=1e-5)


def test_rows_of_strided_inputs() -> None:
    c = case(40, 16, 100, torch.float32)
    wide, heavy = torch.randn(40, 50), torch.randn(100, 30)
    wide[:, 3:19], heavy[:, 5:21] = c.x, c.w
    x, w, y = (a.to(DEVICE) for a in (wide, heavy, c.y))
    got = linear_logprob(x[:, 3:19], w[:, 5:21], y, impl="triton")
    want = linear_logprob(c.x.to(DEVICE), c.w.to(DEVICE), y, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    every_other = linear_logprob(x[:, 3:35:2], w[:, 5:21], y, impl="triton")
    again = linear_logprob(x[:, 3:35:2].contiguous(), w[:, 5:21], y, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(every_other, again))
    with pytest.raises(ValueError, match="reads rows of weight as they lie"):
        linear_logprob(x[:, 3:19], w[:, 5:21].t().contiguous().t(), y, impl="triton")


@pytest.mark.parametrize("level", [-1e30, -3e4, 3e4])
def test_rows_at_an_extreme_level(level: float) -> None:
    bias = torch.full((200,), level, device=DEVICE)
    x, w = torch.zeros(2, 3, device=DEVICE), torch.randn(200, 3, device=DEVICE)
    stats = linear_logprob(x, w, torch.tensor([5, 199], device=DEVICE), bias=bias, impl="triton")
    assert stats.logp.tolist() == pytest.approx([-torch.tensor(200.0).log().item()] * 2, rel=1e-5)


def test_a_peaked_row_is_certain() -> None:
    """Embeddings copied into the head, as tied weights give them."""
    x = torch.nn.functional.normalize(torch.randn(50, 16, device=DEVICE), dim=1)
    stats = linear_logprob(x * 300, x, torch.arange(50, device=DEVICE), impl="triton")
    assert (stats.logp == 0).all()
    assert (stats.entropy.abs() < 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_breaks_only_itself(value: float, dtype: torch.dtype) -> None:
    c = case(40, 5, 100, dtype)
    clean = run(c)
    c.t[3, 0] = value
    got, others = run(c), torch.arange(40) != 3
    assert got["reverse_kl"][3].isnan()
    assert got["student_logp"][3] == clean["student_logp"][3]
    assert all(torch.equal(got[name][others], clean[name][others]) for name in got)


def test_words_of_probability_zero() -> None:
    """A bias of -inf: where both have it, it adds nothing; where one has it, one KL is infinite."""
    c = case(20, 8, 90, torch.float32)
    bias, other = torch.zeros(90), torch.zeros(90)
    bias[[4, 40]], other[40] = -torch.inf, -torch.inf
    y = torch.full((20,), 7)
    x, w, y, t, bias, other = (a.to(DEVICE) for a in (c.x, c.w, y, c.t, bias, other))
    got = linear_divergence(x, w, y, t, bias=bias, teacher_bias=other, features=("jsd", "tv"), impl="triton")
    want = linear_divergence(x, w, y, t, bias=bias, teacher_bias=other, features=("jsd", "tv"), impl="torch")
    assert (got.forward_kl == torch.inf).all() and got.reverse_kl.isfinite().all()
    for name, value in want._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(got, name), value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_top_k() -> None:
    c = case(20, 8, 90, torch.float32)
    x, w, y, t = (a.to(DEVICE) for a in c)
    got = linear_divergence(x, w, y, t, top_k=5, impl="triton")
    p, q = reference.logits(c.x.double(), c.w.double()), reference.logits(c.t.double(), c.w.double())
    reverse, forward = reference.topk_kl(p, q, c.y, 5)
    torch.testing.assert_close(got.topk_reverse_kl.cpu().double(), reverse, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.topk_forward_kl.cpu().double(), forward, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shares", [1, 2, 5, 64])
def test_any_number_of_shares(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgcd_kernels.triton import launch

    c = case(20, 8, 300, torch.float32)
    monkeypatch.setattr(launch, "slots_of", lambda device, config: 2 * shares)
    got, want = run(c), exact(c)
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=4e-6, msg=lambda m, n=name: n + m)


def test_no_tokens() -> None:
    x, w = torch.randn(0, 4, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    y = torch.zeros(0, dtype=torch.long, device=DEVICE)
    stats = linear_divergence(x, w, y, x, features=("jsd",), impl="triton")
    assert stats.reverse_kl.shape == (0,) and stats.jsd is not None and stats.jsd.shape == (0,)
