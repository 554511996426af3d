"""linear_distill_loss: values equal the divergence, gradients equal autograd's through the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sgcd_kernels import linear_distill_loss, linear_divergence, reference
from sgcd_kernels.backends.torch import blocks

F64 = torch.float64
KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "reverse_kl": reference.kl,
    "forward_kl": lambda p, q: reference.kl(q, p),
    "jsd": lambda p, q: reference.jsd(p, q, 0.3),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_TOKENS", 5)
    monkeypatch.setitem(blocks.WORKSPACE_BYTES, "cpu", 8192)


def inputs(n: int = 11, h: int = 5, v: int = 150, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    torch.manual_seed(n + h + v)
    x, w, b = torch.randn(n, h, dtype=dtype), torch.randn(v, h, dtype=dtype), torch.randn(v, dtype=dtype)
    return [*(leaf.requires_grad_() for leaf in (x, w, b)), torch.randn(n, h, dtype=dtype)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_value_and_gradients_equal_reference(kind: str, softcap: float | None) -> None:
    x, w, b, t = inputs()
    mask = torch.arange(11) % 4 != 1
    upstream = torch.randn(11, dtype=F64)
    got = linear_distill_loss(
        x, w, t, mask=mask, kind=kind, beta=0.3, reduction="none", bias=b, temperature=0.8, softcap=softcap
    )
    grads = torch.autograd.grad(got, (x, w, b), upstream)
    q = reference.logits(t, w.detach(), b.detach(), 0.8, softcap)  # the teacher shares the head and gets no gradient
    want = KINDS[kind](reference.logits(x, w, b, 0.8, softcap), q) * mask
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for a, e in zip(grads, torch.autograd.grad(want, (x, w, b), upstream)):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    x, w, b, t = inputs(4, 3, 70)
    tw = torch.randn(70, 3, dtype=F64)
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_distill_loss(x, w, t, tw, kind=kind, beta=0.3, bias=b, reduction="none"), (x, w, b)
    )


def test_reductions() -> None:
    x, w, _, t = inputs()
    mask = torch.arange(11) < 6
    each = linear_distill_loss(x, w, t, mask=mask, reduction="none")
    assert torch.equal(each[6:], torch.zeros(5, dtype=F64))
    torch.testing.assert_close(linear_distill_loss(x, w, t, mask=mask), each.sum() / 6)
    torch.testing.assert_close(linear_distill_loss(x, w, t, mask=mask, reduction="sum"), each.sum())
    torch.testing.assert_close(each[:6], linear_divergence(x, w, torch.zeros(11).long(), t).reverse_kl[:6])


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_have_no_influence_and_none_left_is_zero(kind: str) -> None:
    x, w, _, t = inputs()
    with torch.no_grad():
        x[2] = torch.nan
    t[3] = torch.inf
    mask = torch.ones(11).bool()
    mask[[2, 3]] = False
    gx, gw = torch.autograd.grad(linear_distill_loss(x, w, t, mask=mask, kind=kind), (x, w))
    assert gx.isfinite().all()
    assert gw.isfinite().all()
    assert (gx[[2, 3]] == 0).all()
    nothing = linear_distill_loss(x, w, t, mask=mask & False, kind=kind)
    assert nothing == 0
    assert all((g == 0).all() for g in torch.autograd.grad(nothing, (x, w)))


@pytest.mark.parametrize("kind", KINDS)
def test_identical_distributions(kind: str) -> None:
    x, w, b, _ = inputs(dtype=torch.float32)
    loss = linear_distill_loss(x, w, x.detach(), bias=b, kind=kind, reduction="sum")
    assert loss == 0
    grad = torch.autograd.grad(loss, x)[0]
    assert float(grad.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_gradient_error_is_within_twice_that_of_plain_pytorch(kind: str) -> None:
    torch.manual_seed(0)
    x, w, t = (
        (torch.randn(40, 64) * 2).bfloat16(),
        (torch.randn(500, 64) / 8).bfloat16(),
        (torch.randn(40, 64) * 2).bfloat16(),
    )

    def gradient(dtype: torch.dtype, loss: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()]
        return list(torch.autograd.grad(loss(*leaves, t.to(dtype)), leaves))

    def plain(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return KINDS[kind](reference.logits(x, w), reference.logits(t, w.detach())).sum()

    def fused(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return linear_distill_loss(x, w, t, kind=kind, beta=0.3, reduction="sum")

    exact = gradient(F64, plain)
    for ours, theirs, e in zip(gradient(torch.bfloat16, fused), gradient(torch.bfloat16, plain), exact):
        assert float((ours - e).norm()) <= 2 * float((theirs - e).norm())
