"""linear_logprob against the reference: values, gradients, extremes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sgcd_kernels import linear_logprob, reference
from sgcd_kernels.backends.torch import blocks
from sgcd_kernels.core.lm_head import LMHead

F64 = torch.float64


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even tiny shapes into several blocks, with ragged ends."""
    monkeypatch.setattr(blocks, "MAX_TOKENS", 5)
    monkeypatch.setitem(blocks.WORKSPACE_BYTES, "cpu", 8192)


def head(n: int, h: int, v: int, dtype: torch.dtype = F64, std: float = 1.0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(n * 31 + h * 7 + v)
    x, w = torch.randn(n, h, dtype=dtype) * std, torch.randn(v, h, dtype=dtype) / h**0.5
    return x, w, torch.randn(v, dtype=dtype), torch.randint(v, (n,))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 65), (17, 13, 131), (5, 8, 64), (12, 7, 200)])
@pytest.mark.parametrize(
    "extras", [{}, {"softcap": 3.0}, {"temperature": 0.6}, {"temperature": "token", "softcap": 2.0}]
)
def test_values_equal_reference(shape: tuple[int, int, int], extras: dict, small_blocks: None) -> None:
    x, w, b, y = head(*shape, std=3.0)
    if extras.get("temperature") == "token":
        extras = extras | {"temperature": torch.rand(shape[0], dtype=F64) + 0.5}
    got = linear_logprob(x, w, y, bias=b, **extras)
    want = reference.logprob(reference.logits(x, w, b, **extras), y)
    for a, e in zip(got, want):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_gradcheck_every_output_and_input(small_blocks: None) -> None:
    x, w, b, y = head(7, 3, 70)
    y[2] = -100
    temperature = torch.rand(7, dtype=F64) + 0.5
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def f(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(linear_logprob(x, w, y, bias=b, temperature=temperature, softcap=2.0))

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("field", ["logp", "entropy", "lse"])
def test_gradcheck_one_output_alone(field: str) -> None:
    x, w, _, y = head(4, 3, 9)
    leaves = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: getattr(linear_logprob(x, w, y), field), leaves)


def test_batched_hidden_equals_packed() -> None:
    x, w, b, y = head(12, 5, 30)
    packed = linear_logprob(x, w, y, bias=b)
    batched = linear_logprob(x.view(3, 4, 5), w, y.view(3, 4), bias=b)
    for a, e in zip(batched, packed):
        assert a.shape == (3, 4)
        assert torch.equal(a.flatten(), e)


def test_ignored_tokens_are_zero_and_touch_nothing() -> None:
    x, w, _, y = head(9, 5, 30)
    y[[0, 4]] = -100
    x[[0, 4]] = torch.nan
    x.requires_grad_(), w.requires_grad_()
    stats = linear_logprob(x, w, y)
    assert all((field[[0, 4]] == 0).all() for field in stats)
    sum(field.sum() for field in stats).backward()
    assert (x.grad[[0, 4]] == 0).all()
    assert x.grad.isfinite().all()
    assert w.grad.isfinite().all()
    alone = linear_logprob(x[[1, 2, 3, 5, 6, 7, 8]].detach(), w, y[[1, 2, 3, 5, 6, 7, 8]])
    torch.testing.assert_close(stats.logp[y >= 0], alone.logp, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_compute(n: int) -> None:
    x, w = torch.randn(n, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    stats = linear_logprob(x, w, torch.full((n,), -100))
    assert stats.logp.shape == (n,)
    stats.logp.sum().backward()
    assert (w.grad == 0).all()
    assert x.grad.shape == (n, 4)
    assert (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_twice_that_of_plain_pytorch(dtype: torch.dtype) -> None:
    x, w, b, y = (t.to(dtype) if t.is_floating_point() else t for t in head(64, 96, 1000, std=2.0))
    exact_leaves = [t.to(F64).requires_grad_() for t in (x, w, b)]
    exact = reference.logprob(reference.logits(*exact_leaves), y)
    torch.autograd.backward([f.sum() for f in exact])
    plain_leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    plain = reference.logprob(reference.logits(*plain_leaves), y)
    torch.autograd.backward([f.sum() for f in plain])
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    got = linear_logprob(leaves[0], leaves[1], y, bias=leaves[2])
    assert all(f.dtype == torch.float32 for f in got)
    torch.autograd.backward([f.sum() for f in got])
    pairs = [
        *zip(got, plain, exact),
        *((a.grad, p.grad, e.grad) for a, p, e in zip(leaves, plain_leaves, exact_leaves)),
    ]
    for a, p, e in pairs:
        floor = 4e-7 * float(e.detach().abs().max())
        assert float((a - e).abs().max()) <= 2 * float((p - e).abs().max()) + floor


def test_half_gradients_keep_their_dtype_and_sum_in_fp32(small_blocks: None) -> None:
    n = 600  # each token adds the same small number: a bf16 running sum would stall at 256 steps
    x, w = torch.ones(n, 1, dtype=torch.bfloat16), torch.zeros(70, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_logprob(x, w, torch.zeros(n, dtype=torch.long)).logp.sum().backward()
    assert w.grad.dtype == torch.bfloat16
    assert float(w.grad[1]) == pytest.approx(-n / 70, rel=4e-3)
    assert float(w.grad[0]) == pytest.approx(n * 69 / 70, rel=4e-3)


def test_a_master_weight_is_multiplied_in_bf16_on_cuda() -> None:
    """fp32 products would cost 15 times as much; elsewhere bf16 is upcast."""
    pairs = {(torch.bfloat16, torch.float32): torch.bfloat16, (torch.bfloat16, torch.bfloat16): torch.bfloat16}
    pairs |= {(torch.float32, torch.bfloat16): torch.float32, (torch.bfloat16, F64): F64}
    for (hidden, weight), want in pairs.items():
        for device in ("cuda", "cpu"):
            with FakeTensorMode():
                x, w = torch.empty(2, 4, dtype=hidden, device=device), torch.empty(3, 4, dtype=weight, device=device)
            widened = torch.promote_types(torch.promote_types(hidden, weight), torch.float32)
            assert blocks.operand_dtype(x, LMHead(w)) == (want if device == "cuda" else widened)


def test_wild_logits() -> None:
    x, w, _, y = head(50, 16, 333, dtype=torch.float32, std=30.0)
    got, want = linear_logprob(x, w, y), reference.logprob(reference.logits(x.to(F64), w.to(F64)), y)
    torch.testing.assert_close(got.logp.to(F64), want[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got.entropy.to(F64), want[1], rtol=1e-4, atol=1e-5)
    assert (got.entropy >= 0).all()


def test_certain_token() -> None:
    w = torch.tensor([[100.0], [0.0], [-100.0]])
    stats = linear_logprob(torch.ones(1, 1), w, torch.tensor([0]))
    assert -1e-30 < stats.logp.item() <= 0  # -e^-100
    assert 0 <= stats.entropy.item() < 1e-30


@pytest.mark.parametrize("level", [-1e30, -3e4, 3e4])
def test_rows_at_an_extreme_level(level: float, small_blocks: None) -> None:
    bias = torch.full((200,), level)
    x, w = torch.zeros(1, 3, requires_grad=True), torch.randn(200, 3)
    stats = linear_logprob(x, w, torch.tensor([5]), bias=bias)
    assert stats.logp.item() == pytest.approx(-torch.tensor(200.0).log().item(), rel=1e-5)
    assert stats.entropy.item() == pytest.approx(torch.tensor(200.0).log().item(), rel=1e-5)
    stats.logp.sum().backward()
    assert x.grad.isfinite().all()


def test_forbidden_vocab_ids_have_probability_zero(small_blocks: None) -> None:
    x, w, b, _ = head(4, 5, 200, dtype=torch.float32)
    b[:130] = -torch.inf  # the first two blocks hold nothing else
    x.requires_grad_(), w.requires_grad_()
    y = torch.tensor([150, 160, 170, 3])
    stats = linear_logprob(x, w, y, bias=b)
    want = reference.logprob(reference.logits(x, w[130:], b[130:]), torch.tensor([20, 30, 40, 0]))
    torch.testing.assert_close(stats.logp[:3], want[0][:3])
    torch.testing.assert_close(stats.entropy, want[1])
    assert stats.logp[3] == -torch.inf
    (stats.logp[:3].sum() + stats.entropy.sum()).backward()
    assert x.grad.isfinite().all()
    assert (w.grad[:130] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_breaks_only_itself(value: float, small_blocks: None) -> None:
    x, w, _, y = head(7, 3, 150, dtype=torch.float32)
    clean = linear_logprob(x, w, y)
    x[3, 0] = value
    stats = linear_logprob(x, w, y)
    others = torch.tensor([0, 1, 2, 4, 5, 6])
    for a, c in zip(stats, clean):
        assert a[3].isnan()
        assert torch.equal(a[others], c[others])


def test_autocast_does_not_round_the_logits() -> None:
    x, w, b, y = head(20, 64, 300, dtype=torch.float32)
    plain = linear_logprob(x, w, y, bias=b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logprob(x, w, y, bias=b)
        mixed = linear_logprob(x.bfloat16(), w, y, bias=b)
    assert torch.equal(plain.logp, inside.logp)
    assert mixed.logp.dtype == torch.float32


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, w, _, y = head(6, 4, 20)
    x.requires_grad_()
    linear_logprob(x, w, y).logp.sum().backward()
    assert w.grad is None
    assert x.grad is not None
