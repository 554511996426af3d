"""The C++ gradients against those of the reference in fp64, and against differences of the C++ values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from sgcd_kernels import backend_status, linear_distill_loss, linear_logprob, linear_policy_loss, reference
from tests.kernels.cpp_inputs import Case, case

STATUS = backend_status()["cpp"]
pytestmark = pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason)
F64 = torch.float64
Leaves = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill all fresh memory, scratch inside the operators too, with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def leaves_of(c: Case, dtype: torch.dtype) -> Leaves:
    bias = torch.linspace(-1, 1, c.w.shape[0])
    return tuple(a.to(dtype).requires_grad_() for a in (c.x, c.w, bias.to(c.w.dtype)))  # type: ignore[return-value]


def grads(loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], leaves: Leaves) -> Leaves:
    return torch.autograd.grad(loss(*leaves), leaves)  # type: ignore[return-value]


def weights(n: int) -> torch.Tensor:
    return torch.linspace(-1, 2, n)


LOGPROB = {"logp": (1, 0, 0), "lse": (0, 0, 1), "all": (1, 0.5, -0.3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 63), (65, 33, 129), (130, 64, 1100), (70, 100, 65)])
@pytest.mark.parametrize("outputs", LOGPROB)
def test_logprob(shape: tuple[int, int, int], dtype: torch.dtype, outputs: str) -> None:
    c = case(*shape, dtype)
    n, extras = shape[0], {"temperature": torch.linspace(0.5, 1.5, shape[0]), "softcap": 6.0}

    def total(stats: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return sum(k * (s * weights(n)).sum() for k, s in zip(LOGPROB[outputs], stats) if k)  # type: ignore[return-value]

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z = reference.logits(x, w, b, temperature=extras["temperature"].to(x.dtype), softcap=6.0)
        return total(reference.logprob(z, c.y))

    got = grads(lambda x, w, b: total(linear_logprob(x, w, c.y, bias=b, impl="cpp", **extras)), leaves_of(c, dtype))
    want, theirs = grads(plain, leaves_of(c, F64)), grads(plain, leaves_of(c, dtype))
    for a, e, p in zip(got, want, theirs):
        assert a.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2  # of the result to its dtype: with few values plain PyTorch may be lucky
        floor = 1e-6 + max(3e-6, rounding) * float(e.abs().max())
        assert float((a - e).abs().max()) <= 2 * float((p - e).abs().max()) + floor


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation(kind: str, dtype: torch.dtype) -> None:
    c = case(70, 20, 300, dtype)
    formulas = {"reverse_kl": reference.kl, "forward_kl": lambda p, q: reference.kl(q, p), "jsd": reference.jsd}

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        q = reference.logits(c.t.to(w.dtype), w.detach(), b.detach(), softcap=9.0)
        return (formulas[kind](reference.logits(x, w, b, softcap=9.0), q) * weights(70)).sum()

    def ours(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        loss = linear_distill_loss(x, w, c.t, kind=kind, bias=b, softcap=9.0, reduction="none", impl="cpp")
        return (loss * weights(70)).sum()

    got = grads(ours, leaves_of(c, dtype))
    want, theirs = grads(plain, leaves_of(c, F64)), grads(plain, leaves_of(c, dtype))
    for a, e, p in zip(got, want, theirs):
        assert float((a - e).abs().max()) <= 2 * float((p - e).abs().max()) + 1e-5 * float(e.abs().max()) + 1e-6


def test_policy_loss_with_masked_rows_and_a_frozen_weight() -> None:
    c = case(90, 24, 400, torch.float32)
    mask = torch.rand(90) > 0.3
    broken = c.x.clone()
    broken[~mask] = torch.nan
    results = []
    for impl in ("cpp", "torch"):
        x = broken.clone().requires_grad_()
        loss, _ = linear_policy_loss(x, c.w, c.y, weights(90), mask=mask, loss_type="dapo", impl=impl)
        loss.backward()
        results.append((loss.detach(), x.grad))
        assert x.grad is not None and (x.grad[~mask] == 0).all()
    (loss, grad), (their_loss, their_grad) = results
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, their_grad, rtol=1e-4, atol=1e-7)


def test_gradients_are_those_of_the_values() -> None:
    """Central differences along random directions: fp32 is too coarse for gradcheck's one coordinate at a time."""
    c = case(80, 16, 260, torch.float32, std=1.0)
    leaves = leaves_of(c, torch.float32)

    def f(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        stats = linear_logprob(x, w, c.y, bias=b, temperature=0.7, softcap=5.0, impl="cpp")
        return ((stats.logp + 0.5 * stats.entropy - 0.2 * stats.lse).double() * weights(80)).sum()

    slopes = grads(f, leaves)
    for which, slope in enumerate(slopes):
        step = 1e-2 * torch.randn_like(slope) / slope.norm()
        moved = [
            [leaf.detach() + (sign * step if i == which else 0) for i, leaf in enumerate(leaves)] for sign in (1, -1)
        ]
        difference = float(f(*moved[0]) - f(*moved[1])) / 2
        assert difference == pytest.approx(float((slope * step).sum()), rel=2e-2, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    c = case(200, 40, 3000, dtype)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        stats_loss = lambda x, w, b: linear_logprob(x, w, c.y, bias=b, impl="cpp").logp.sum()  # noqa: E731
        results.append(grads(stats_loss, leaves_of(c, dtype)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_tokens_than_are_packed_at_one_time(dtype: torch.dtype) -> None:
    c = case(7000 if dtype == torch.float32 else 13000, 512, 150, dtype, std=0.5)
    n = c.x.shape[0]
    results = {}
    for impl in ("cpp", "torch"):
        x, w = c.x.clone().requires_grad_(), c.w.clone().requires_grad_()
        (linear_logprob(x, w, c.y, impl=impl).logp * weights(n)).sum().backward()
        results[impl] = (x.grad, w.grad)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, e in zip(results["cpp"], results["torch"]):
        assert float((a - e).abs().max()) <= tolerance * float(e.abs().max())


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_compute(n: int) -> None:
    x, w = torch.randn(n, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    linear_logprob(x, w, torch.full((n,), -100), impl="cpp").logp.sum().backward()
    assert (w.grad == 0).all()
    assert x.grad.shape == (n, 4)
