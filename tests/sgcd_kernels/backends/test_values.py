"""The scoring kernels of both compiled backends against the reference in fp64, at awkward shapes and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sgcd_kernels import linear_divergence, linear_logprob, reference
from tests.sgcd_kernels.backends.cases import DEVICES, IMPLS, Case, case, exact, on, skip_if_slow

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.parametrize("impl", IMPLS, indirect=True)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),
    (1, 3, 2),
    (3, 5, 31),
    (3, 5, 63),
    (16, 16, 32),
    (17, 33, 65),
    (70, 20, 300),
    (64, 8, 64),
    (65, 33, 65),
]
LARGE = [(130, 64, 1000), (17, 7, 4133)]
Stats = dict[str, torch.Tensor]


def run(c: Case, impl: str, **extras: Any) -> Stats:
    x, w, y, t = on(c, impl)
    extras = {k: v.to(DEVICES[impl]) if isinstance(v, torch.Tensor) else v for k, v in extras.items()}
    got = linear_divergence(x, w, y, t, features=("jsd", "tv"), beta=0.3, impl=impl, **extras)
    return {k: v.cpu() for k, v in got._asdict().items() if v is not None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_error_is_that_of_fp32(impl: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Not that of the dtype: half inputs are multiplied exactly and summed in fp32."""
    skip_if_slow(impl, shape[0], shape[2])
    c = case(*shape, dtype)
    got, want, plain = run(c, impl), exact(c), exact(c, torch.float32)
    for name, value in want.items():
        error, allowed = (got[name] - value).abs().max(), (plain[name] - value).abs().max()
        assert error <= 2 * allowed + 3e-7 * (1 + value.abs().max()), name


@pytest.mark.parametrize("shape", SHAPES)
def test_one_head_alone(impl: str, shape: tuple[int, int, int]) -> None:
    c = case(*shape, torch.bfloat16)
    got = linear_logprob(*on(c, impl)[:3], impl=impl)
    z = reference.logits(c.x.double(), c.w.double())
    for mine, want in zip(got, reference.logprob(z, c.y)):
        torch.testing.assert_close(mine.cpu().double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [{"softcap": 3.0}, {"temperature": 0.6}, {"temperature": "token", "softcap": 30.0}])
def test_bias_softcap_and_temperature(impl: str, extras: dict[str, Any], dtype: torch.dtype) -> None:
    c = case(40, 12, 133, dtype, std=4.0)
    extras = extras | {"bias": torch.randn(133)}
    if extras.get("temperature") == "token":
        extras["temperature"] = torch.rand(40) + 0.5
    got, want = run(c, impl, **extras), exact(c, **extras)
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=2e-5, atol=4e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_of_its_own_and_a_mixture_of_dtypes(impl: str, dtype: torch.dtype) -> None:
    c = case(40, 12, 100, torch.bfloat16)
    t, tw = torch.randn(40, 7).to(dtype), torch.randn(100, 7).to(dtype)
    x, w, y, tt, ttw = (a.to(DEVICES[impl]) for a in (c.x, c.w, c.y, t, tw))
    got = linear_divergence(x, w, y, tt, ttw, features=("tv",), impl=impl)
    p, q = reference.logits(c.x.double(), c.w.double()), reference.logits(t.double(), tw.double())
    torch.testing.assert_close(got.reverse_kl.cpu().double(), reference.kl(p, q), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.tv.cpu().double(), reference.tv(p, q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [0.01, 2.0, 30.0])
@pytest.mark.parametrize("copied", [False, True])
def test_equal_heads_give_exactly_zero(impl: str, dtype: torch.dtype, std: float, copied: bool) -> None:
    c = case(20, 24, 500, dtype, std)
    x, w, y = on(c, impl)[:3]
    other = w.clone() if copied else None
    got = linear_divergence(x, w, y, x.clone(), other, features=("jsd", "tv"), impl=impl)
    for name in ("reverse_kl", "forward_kl", "jsd", "tv"):
        assert (getattr(got, name) == 0).all(), name
    assert (got.bhattacharyya == 1).all()


def test_masked_tokens_are_left_out(impl: str) -> None:
    c = case(50, 12, 100, torch.float32)
    y = c.y.clone()
    y[::3] = -100
    x = c.x.clone()
    x[::3] = torch.nan
    got = linear_divergence(*(a.to(DEVICES[impl]) for a in (x, c.w, y, c.t)), impl=impl)
    keep = y != -100
    want = exact(c)
    assert (got.reverse_kl.cpu()[~keep] == 0).all() and (got.student_logp.cpu()[~keep] == 0).all()
    torch.testing.assert_close(got.reverse_kl.cpu()[keep].double(), want["reverse_kl"][keep], rtol=1e-5, atol=1e-5)


def test_rows_of_strided_inputs(impl: str) -> None:
    c = case(40, 16, 100, torch.float32)
    wide, heavy = torch.randn(40, 50), torch.randn(100, 30)
    wide[:, 3:19], heavy[:, 5:21] = c.x, c.w
    x, w, y = (a.to(DEVICES[impl]) for a in (wide, heavy, c.y))
    got = linear_logprob(x[:, 3:19], w[:, 5:21], y, impl=impl)
    want = linear_logprob(c.x.to(DEVICES[impl]), c.w.to(DEVICES[impl]), y, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    every_other = linear_logprob(x[:, 3:35:2], w[:, 5:21], y, impl=impl)
    again = linear_logprob(x[:, 3:35:2].contiguous(), w[:, 5:21], y, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(every_other, again))
    for n in (1, 0):  # what PyTorch calls contiguous may still have columns apart
        few = linear_logprob(x[:n, 3:35:2], w[:, 5:21], y[:n], impl=impl)
        torch.testing.assert_close(few.lse, every_other.lse[:n], rtol=1e-6, atol=1e-6)
    by_columns = linear_logprob(x[:, 3:19], w[:, 5:21].t().contiguous().t(), y, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(by_columns, want))


@pytest.mark.parametrize("level", [-1e30, -3e4, 3e4])
def test_rows_at_an_extreme_level(impl: str, level: float) -> None:
    bias = torch.full((200,), level, device=DEVICES[impl])
    x, w = torch.zeros(2, 3, device=DEVICES[impl]), torch.randn(200, 3, device=DEVICES[impl])
    stats = linear_logprob(x, w, torch.tensor([5, 199], device=DEVICES[impl]), bias=bias, impl=impl)
    assert stats.logp.tolist() == pytest.approx([-torch.tensor(200.0).log().item()] * 2, rel=1e-5)


def test_a_peaked_row_is_certain(impl: str) -> None:
    """Embeddings copied into the head, as tied weights give them."""
    x = torch.nn.functional.normalize(torch.randn(50, 16, device=DEVICES[impl]), dim=1)
    y = torch.arange(50, device=DEVICES[impl])
    stats = linear_logprob(x * 300, x, y, impl=impl)
    logp, entropy, _ = reference.logprob(300 * x.double() @ x.double().T, y)
    torch.testing.assert_close(stats.logp.double(), logp, rtol=3e-4, atol=3e-7)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=3e-4, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_breaks_only_itself(impl: str, value: float, dtype: torch.dtype) -> None:
    c = case(40, 5, 100, dtype)
    clean = run(c, impl)
    c.t[3, 0] = value
    got, others = run(c, impl), torch.arange(40) != 3
    assert got["reverse_kl"][3].isnan()
    assert got["student_logp"][3] == clean["student_logp"][3]
    assert all(torch.equal(got[name][others], clean[name][others]) for name in got)


def test_words_of_probability_zero(impl: str) -> None:
    """A bias of -inf: where both have it, it adds nothing; where one has it, one KL is infinite."""
    c = case(20, 8, 90, torch.float32)
    bias, other = torch.zeros(90), torch.zeros(90)
    bias[[4, 40]], other[40] = -torch.inf, -torch.inf
    y = torch.full((20,), 7)
    x, w, y, t, bias, other = (a.to(DEVICES[impl]) for a in (c.x, c.w, y, c.t, bias, other))
    got = linear_divergence(x, w, y, t, bias=bias, teacher_bias=other, features=("jsd", "tv"), impl=impl)
    want = linear_divergence(x, w, y, t, bias=bias, teacher_bias=other, features=("jsd", "tv"), impl="torch")
    assert (got.forward_kl == torch.inf).all() and got.reverse_kl.isfinite().all()
    for name, value in want._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(got, name), value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_top_k(impl: str) -> None:
    c = case(20, 8, 90, torch.float32)
    x, w, y, t = on(c, impl)
    got = linear_divergence(x, w, y, t, top_k=5, impl=impl)
    p, q = reference.logits(c.x.double(), c.w.double()), reference.logits(c.t.double(), c.w.double())
    reverse, forward = reference.topk_kl(p, q, c.y, 5)
    torch.testing.assert_close(got.topk_reverse_kl.cpu().double(), reverse, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.topk_forward_kl.cpu().double(), forward, rtol=1e-4, atol=1e-5)


def test_no_tokens(impl: str) -> None:
    x, w = torch.randn(0, 4, device=DEVICES[impl]), torch.randn(6, 4, device=DEVICES[impl])
    y = torch.zeros(0, dtype=torch.long, device=DEVICES[impl])
    stats = linear_divergence(x, w, y, x, features=("jsd",), impl=impl)
    assert stats.reverse_kl.shape == (0,) and stats.jsd is not None and stats.jsd.shape == (0,)
