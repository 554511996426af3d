"""What only the C++ gradients have: differences of their own values, threads, and packed groups of tokens."""

from __future__ import annotations

import pytest
import torch

from sgcd_kernels import backend_status, linear_logprob, linear_policy_loss
from tests.sgcd_kernels.backends.cases import case, grads, leaves_of, weights

STATUS = backend_status()["cpp"]
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason)]


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
