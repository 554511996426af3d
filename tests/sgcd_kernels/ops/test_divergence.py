"""linear_divergence against the reference, its bounds, and what it does at the extremes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgcd_kernels import linear_divergence, reference
from sgcd_kernels.backends.torch import blocks
from tests.properties import examples

F64 = torch.float64
ALL: dict[str, Any] = {"features": ("jsd", "tv"), "top_k": 4}
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "tv", "topk_reverse_kl", "topk_forward_kl")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even tiny shapes into several blocks, with ragged ends."""
    monkeypatch.setattr(blocks, "MAX_TOKENS", 5)
    monkeypatch.setitem(blocks.WORKSPACE_BYTES, "cpu", 8192)


def pair(n: int, h: int, v: int, dtype: torch.dtype = F64, std: float = 1.0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(n * 31 + h * 7 + v)
    x, w = torch.randn(n, h, dtype=dtype) * std, torch.randn(v, h, dtype=dtype) / h**0.5
    return x, w, torch.randint(v, (n,)), x + 0.3 * std * torch.randn(n, h, dtype=dtype)


def expected(p: torch.Tensor, q: torch.Tensor, y: torch.Tensor, beta: float, k: int) -> dict[str, torch.Tensor]:
    s, t = reference.logprob(p, y), reference.logprob(q, y)
    top = reference.topk_kl(p, q, y, k)
    return {
        "student_logp": s[0],
        "teacher_logp": t[0],
        "student_entropy": s[1],
        "teacher_entropy": t[1],
        "student_lse": s[2],
        "teacher_lse": t[2],
        "reverse_kl": reference.kl(p, q),
        "forward_kl": reference.kl(q, p),
        "bhattacharyya": reference.bhattacharyya(p, q),
        "jsd": reference.jsd(p, q, beta),
        "tv": reference.tv(p, q),
        "topk_reverse_kl": top[0],
        "topk_forward_kl": top[1],
    }


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 3, 65), (17, 13, 131), (12, 7, 200)])
@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_values_equal_reference(shape: tuple[int, int, int], beta: float, small_blocks: None) -> None:
    x, w, y, t = pair(*shape, std=3.0)
    n, _, v = shape
    t, tw = torch.cat([t, t[:, :1]], 1), torch.cat([w, w[:, :1]], 1)  # another hidden size
    b, tb, temperature = torch.randn(v, dtype=F64), torch.randn(v, dtype=F64), torch.rand(n, dtype=F64) + 0.5
    got = linear_divergence(
        x,
        w,
        y,
        t,
        tw,
        bias=b,
        teacher_bias=tb,
        temperature=temperature,
        softcap=4.0,
        beta=beta,
        features=("jsd", "tv"),
        top_k=2,
    )
    want = expected(
        reference.logits(x, w, b, temperature, 4.0), reference.logits(t, tw, tb, temperature, 4.0), y, beta, 2
    )
    for name, value in want.items():
        torch.testing.assert_close(
            getattr(got, name), value, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_temperature_is_applied_once_to_both() -> None:
    x, w, y, t = pair(5, 4, 30)
    scaled, halved = linear_divergence(x, w, y, t, temperature=2.0), linear_divergence(x, w / 2, y, t)
    for a, b in zip(scaled[:9], halved[:9]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1.0, 30.0])
def test_identical_distributions_give_exactly_zero(dtype: torch.dtype, std: float, small_blocks: None) -> None:
    x, w, y, _ = pair(23, 7, 301, dtype=dtype, std=std)
    got = linear_divergence(x, w, y, x.clone(), **ALL)
    for name in DIVERGENCES:
        assert (getattr(got, name) == 0).all(), name
    assert (got.bhattacharyya == 1).all()
    assert torch.equal(got.student_logp, got.teacher_logp)


@given(
    seed=st.integers(0, 10_000),
    std=st.sampled_from([0.01, 1.0, 10.0, 30.0]),
    shift=st.floats(0, 3),
    k=st.integers(1, 40),
)
@settings(max_examples=examples(40))
def test_bounds(seed: int, std: float, shift: float, k: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(6, 5, generator=g) * std, torch.randn(40, 5, generator=g)
    t = x + shift * torch.randn(6, 5, generator=g)
    y = torch.randint(40, (6,), generator=g)
    got = linear_divergence(x, w, y, t, features=("jsd", "tv"), top_k=k)
    assert all(field.isfinite().all() for field in got)
    assert all((getattr(got, name) >= 0).all() for name in DIVERGENCES)
    assert (got.jsd <= math.log(2)).all()
    assert (got.tv <= 1).all()
    assert (got.bhattacharyya <= 1).all()
    for top, full in ((got.topk_reverse_kl, got.reverse_kl), (got.topk_forward_kl, got.forward_kl)):
        rounding = 2e-6 * (1 + (got.student_lse - got.teacher_lse).abs())  # a KL is a difference of numbers this large
        assert (top <= full * (1 + 1e-5) + rounding).all()
    assert (got.tv**2 / 2 <= got.reverse_kl / 4 + 2e-6).all()  # Pinsker, the half of it


@pytest.mark.parametrize("k", [1, 3, 39])
def test_top_and_tail_never_exceed_the_full_divergence(k: int) -> None:
    for std in (0.1, 1.0, 5.0):
        got = linear_divergence(*pair(50, 5, 40, std=std), top_k=k)
        assert (got.topk_reverse_kl <= got.reverse_kl + 1e-10).all()
        assert (got.topk_forward_kl <= got.forward_kl + 1e-10).all()
        assert (got.topk_reverse_kl > 0).all()


def test_a_tail_that_underflows_on_one_side_stays_finite() -> None:
    w = torch.tensor([[0.0], [-1.0]])
    got = linear_divergence(torch.tensor([[100.0]]), w, torch.tensor([0]), torch.tensor([[200.0]]), top_k=1)
    assert 0 <= got.topk_reverse_kl.item() < 1e-30
    assert got.topk_forward_kl.item() == 0


def test_all_words_in_the_top_is_the_full_divergence() -> None:
    x, w, y, t = pair(6, 5, 40)
    got = linear_divergence(x, w, y, t, top_k=40)
    torch.testing.assert_close(got.topk_reverse_kl, got.reverse_kl)
    torch.testing.assert_close(got.topk_forward_kl, got.forward_kl)


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3])
def test_small_divergences_keep_their_digits(scale: float) -> None:
    """fp32 against fp64: a few units of rounding of 1, whatever the size of the logits; plain PyTorch loses more."""
    x, w, y, _ = pair(64, 32, 2000, dtype=torch.float32, std=5.0)
    t = x + scale * torch.randn_like(x)
    got, exact = linear_divergence(x, w, y, t), linear_divergence(x.double(), w.double(), y, t.double())
    p, q = reference.logits(x, w), reference.logits(t, w)
    for name, plain in (("reverse_kl", reference.kl(p, q)), ("forward_kl", reference.kl(q, p))):
        error = (getattr(got, name) - getattr(exact, name)).abs()
        assert (error <= 1e-5 * getattr(exact, name) + 5e-7).all()
        assert error.mean() < (plain - getattr(exact, name)).abs().mean()


def test_bf16_error_is_within_twice_that_of_plain_pytorch() -> None:
    x, w, y, t = (a.bfloat16() if a.is_floating_point() else a for a in pair(64, 96, 1000, std=2.0))
    got = linear_divergence(x, w, y, t, **ALL)
    p, q = reference.logits(x, w), reference.logits(t, w)
    exact = expected(reference.logits(x.double(), w.double()), reference.logits(t.double(), w.double()), y, 0.5, 4)
    for name, plain in expected(p, q, y, 0.5, 4).items():
        ours = float((getattr(got, name) - exact[name]).abs().max())
        assert ours <= 2 * float((plain - exact[name]).abs().max()) + 1e-6, name


def test_no_gradient_and_no_graph() -> None:
    x, w, y, t = pair(5, 4, 30)
    got = linear_divergence(x.requires_grad_(), w.requires_grad_(), y, t.requires_grad_(), **ALL)
    assert not any(field.requires_grad for field in got)


def test_only_what_was_asked_for() -> None:
    got = linear_divergence(*pair(5, 4, 30))
    assert (got.jsd, got.tv, got.topk_reverse_kl, got.topk_forward_kl) == (None,) * 4


def test_ignored_tokens_are_zero_and_batched_equals_packed() -> None:
    x, w, y, t = pair(12, 5, 30)
    y[[0, 7]] = -100
    x[7], t[0] = torch.nan, torch.inf
    packed = linear_divergence(x, w, y, t, **ALL)
    assert all((field[[0, 7]] == 0).all() for field in packed)
    assert all(field.isfinite().all() for field in packed)
    batched = linear_divergence(x.view(3, 4, 5), w, y.view(3, 4), t.view(3, 4, 5), **ALL)
    assert all(torch.equal(a.flatten(), b) for a, b in zip(batched, packed))


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 1 - 1e-3, 1 - 1e-6])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_jsd_near_its_ends_on_peaked_logits(beta: float, dtype: torch.dtype) -> None:
    """There 1 - beta is all that is left where the teacher, or the student, has no mass."""
    torch.manual_seed(0)
    x, t, w = torch.randn(6, 8) * 6, torch.randn(6, 8) * 6, torch.randn(60, 8)
    y = torch.zeros(6, dtype=torch.long)
    got = linear_divergence(x.to(dtype), w.to(dtype), y, t.to(dtype), features=("jsd",), beta=beta).jsd
    want = reference.jsd(reference.logits(x.double(), w.double()), reference.logits(t.double(), w.double()), beta)
    tolerance = {"rtol": 1e-9, "atol": 1e-15} if dtype == F64 else {"rtol": 5e-3, "atol": 2e-7}
    torch.testing.assert_close(got.double(), want, **tolerance)


@pytest.mark.parametrize("layout", ["transposed", "columns", "weight"])
def test_identical_values_in_another_memory_layout_give_exactly_zero(layout: str) -> None:
    """A product's last bit may depend on strides."""
    for n, h in ((3, 7), (17, 129), (5, 576)):
        x, w, y, _ = pair(n, h, 1003, dtype=torch.float32)
        t, teacher_weight = x, None
        if layout == "transposed":
            t = x.t().contiguous().t()
        elif layout == "columns":
            t = torch.stack([x, x], 1)[:, 1]
        else:
            teacher_weight = w.t().contiguous().t()
        got = linear_divergence(x, w, y, t, teacher_weight)
        assert (got.reverse_kl == 0).all() and (got.forward_kl == 0).all()
        assert (got.bhattacharyya == 1).all()


def test_a_forbidden_vocab_id_with_a_bucket_of_its_own_makes_the_top_k_infinite() -> None:
    """The full KL is infinite either way; in the tail bucket it disappears."""
    w, bias = torch.eye(5), torch.zeros(5)
    bias[0] = -torch.inf
    x, t = torch.zeros(1, 5), torch.tensor([[3.0, 2.0, 0, 0, 0]])
    student = linear_divergence(x, w, torch.tensor([3]), t, w, bias=bias, teacher_bias=torch.zeros(5), top_k=1)
    assert student.forward_kl.item() == student.topk_forward_kl.item() == torch.inf
    assert student.topk_reverse_kl.isfinite()
    for target, infinite in ((0, True), (3, False)):
        teacher = linear_divergence(x, w, torch.tensor([target]), t, w, bias=torch.zeros(5), teacher_bias=bias, top_k=1)
        assert teacher.reverse_kl.item() == torch.inf
        assert teacher.topk_reverse_kl.isinf().item() is infinite
        assert teacher.topk_forward_kl.isfinite()


@pytest.mark.parametrize("n", [0, 4])
def test_nothing_to_compute(n: int) -> None:
    got = linear_divergence(torch.randn(n, 3), torch.randn(7, 3), torch.full((n,), -100), torch.randn(n, 3), **ALL)
    assert all(field.shape == (n,) and (field == 0).all() for field in got)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_breaks_only_itself(value: float, small_blocks: None) -> None:
    x, w, y, t = pair(7, 3, 150, dtype=torch.float32)
    clean = linear_divergence(x, w, y, t, features=("jsd", "tv"))
    t[3, 0] = value
    got = linear_divergence(x, w, y, t, features=("jsd", "tv"))
    others = torch.tensor([0, 1, 2, 4, 5, 6])
    for name in ("reverse_kl", "forward_kl", "bhattacharyya", "jsd", "tv", "teacher_logp"):
        assert getattr(got, name)[3].isnan(), name
        assert torch.equal(getattr(got, name)[others], getattr(clean, name)[others])


def test_vocab_ids_of_probability_zero(small_blocks: None) -> None:
    x, w, y, t = pair(4, 3, 200, dtype=torch.float32)
    y = y.clamp(min=150)
    shared = torch.zeros(200)
    shared[:130] = -torch.inf
    both = linear_divergence(x, w, y, t, bias=shared, **ALL)
    without = linear_divergence(x, w[130:], y - 130, t, **ALL)
    for name in DIVERGENCES:
        torch.testing.assert_close(getattr(both, name), getattr(without, name), rtol=1e-4, atol=1e-5)
    only_p = linear_divergence(x, w, y, t, w, bias=shared, features=("jsd", "tv"))
    assert (only_p.forward_kl == torch.inf).all()
    assert only_p.reverse_kl.isfinite().all()
    assert only_p.jsd.isfinite().all()
    only_q = linear_divergence(x, w, y, t, bias=torch.zeros(200), teacher_bias=shared, features=("jsd", "tv"))
    assert (only_q.reverse_kl == torch.inf).all()
    assert only_q.forward_kl.isfinite().all()


def test_disjoint_distributions() -> None:
    w = torch.eye(3) * 60
    got = linear_divergence(
        torch.tensor([[1.0, -1, -1]]), w, torch.tensor([0]), torch.tensor([[-1.0, -1, 1]]), **(ALL | {"top_k": 1})
    )
    assert got.jsd.item() == pytest.approx(math.log(2), rel=1e-6)
    assert got.tv.item() == pytest.approx(1.0)
    assert got.reverse_kl.item() == pytest.approx(120.0, rel=1e-5)
    assert 0 <= got.bhattacharyya.item() < 1e-25
