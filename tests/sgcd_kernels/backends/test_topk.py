"""The teacher's K most likely vocab ids and the bucket with all others: each backend against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

from sgcd_kernels import linear_divergence, reference
from tests.sgcd_kernels.backends.cases import DEVICES, Case, case, on

pytestmark = [pytest.mark.usefixtures("poison")]
IMPLS = ("torch", "cpp", "triton")
EVERY = pytest.mark.parametrize("impl", IMPLS, indirect=True)
CASES = [  # n, h, v, k, std: one tile and many, K of one vocab id and of all, peaked and flat rows
    (1, 1, 1, 1, 2.0),
    (20, 8, 90, 5, 2.0),
    (33, 17, 301, 7, 2.0),
    (5, 3, 64, 64, 2.0),
    (7, 3, 65, 65, 0.01),
    (20, 12, 200, 199, 0.01),
    (18, 16, 500, 3, 30.0),
]
DEVICES = DEVICES | {"torch": "cpu"}


def compare(c: Case, k: int, impl: str, **extras: torch.Tensor) -> None:
    x, w, y, t = (a.to(DEVICES[impl]) for a in c)
    device = {name: value.to(DEVICES[impl]) for name, value in extras.items()}
    got = linear_divergence(x, w, y, t, top_k=k, impl=impl, **device)
    q_bias = extras.get("teacher_bias", extras.get("bias"))
    p = reference.logits(c.x.double(), c.w.double(), extras.get("bias"))
    q = reference.logits(c.t.double(), c.w.double(), q_bias)
    for mine, want in zip((got.topk_reverse_kl, got.topk_forward_kl), reference.topk_kl(p, q, c.y, k), strict=True):
        torch.testing.assert_close(mine.cpu().double(), want, rtol=2e-5, atol=2e-6 * (1 + float(c.x.abs().max())))
    torch.testing.assert_close(got.reverse_kl.cpu().double(), reference.kl(p, q), rtol=2e-5, atol=1e-4)


@EVERY
@pytest.mark.parametrize(("n", "h", "v", "k", "std"), CASES)
def test_against_the_reference(impl: str, n: int, h: int, v: int, k: int, std: float) -> None:
    compare(case(n, h, v, torch.float32, std), k, impl)


@EVERY
def test_forbidden_vocab_ids(impl: str) -> None:
    """Of probability 0 in both heads, and as many as leave fewer vocab ids than K."""
    bias = torch.full((150,), -torch.inf)
    bias[::4] = 0.0
    c = case(10, 8, 150, torch.float32)
    compare(c._replace(y=torch.full((10,), 4)), 45, impl, bias=bias)


@EVERY
def test_only_the_teacher_forbids(impl: str) -> None:
    c = case(10, 8, 150, torch.float32)
    c = c._replace(y=torch.full((10,), 5))
    for vocab_id, k, infinite in ((5, 3, True), (6, 3, False), (6, 150, True)):
        bias, other = torch.zeros(150), torch.zeros(150)
        other[vocab_id] = -torch.inf
        device = DEVICES[impl]
        x, w, y, t = (a.to(device) for a in c)
        got = linear_divergence(x, w, y, t, bias=bias.to(device), teacher_bias=other.to(device), top_k=k, impl=impl)
        assert (got.topk_reverse_kl.isinf() == infinite).all() and got.topk_forward_kl.isfinite().all()


@EVERY
def test_equal_heads_and_a_broken_row(impl: str) -> None:
    c = case(20, 24, 300, torch.float32, 30.0)
    x, w, y, _ = (a.to(DEVICES[impl]) for a in c)
    got = linear_divergence(x, w, y, x.clone(), top_k=9, impl=impl)
    assert (got.topk_reverse_kl == 0).all() and (got.topk_forward_kl == 0).all()
    x[3, 0] = torch.nan
    got = linear_divergence(x, w, y, c.x.to(x.device), top_k=9, impl=impl)
    others = torch.arange(20) != 3
    assert got.topk_reverse_kl[3].isnan() and (got.topk_reverse_kl.cpu()[others] == 0).all()


@EVERY
def test_masked_tokens_and_a_teacher_of_its_own(impl: str) -> None:
    c = case(30, 12, 140, torch.float32)
    t, v, y = torch.randn(30, 7), torch.randn(140, 7), c.y.clone()
    y[1::2] = -100
    x, w, y, t, v = (a.to(DEVICES[impl]) for a in (c.x, c.w, y, t, v))
    got = linear_divergence(x, w, y, t, v, top_k=5, impl=impl)
    p, q = (reference.logits(a.cpu().double(), b.cpu().double()) for a, b in ((x, w), (t, v)))
    reverse, forward = reference.topk_kl(p[::2], q[::2], c.y[::2], 5)
    torch.testing.assert_close(got.topk_reverse_kl.cpu().double()[::2], reverse, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(got.topk_forward_kl.cpu().double()[::2], forward, rtol=2e-5, atol=1e-5)
    assert (got.topk_reverse_kl[1::2] == 0).all()


def test_a_tail_beside_a_certain_vocab_id_keeps_its_digits() -> None:
    """Tiles that hold no bucket, and vocab ids left over in those that do: 1 minus the rest would be 0."""
    pytest.importorskip("triton")
    device = DEVICES["triton"]
    z = torch.full((2, 200), -20.0)
    z[:, 0] = 10.0
    z[1, 150:] = -25.0
    w, x = torch.eye(200, device=device), z.to(device)
    y = torch.zeros(2, dtype=torch.long, device=device)
    got = linear_divergence(x[:1], w, y[:1], x[1:], top_k=1, impl="triton")
    p, q = (row.double().softmax(0)[1:].sum() for row in z)
    # Both terms: the certain vocab id's own log-probs, -1e-11, are not 0 in fp32 either.
    truth = p * (p / q).log() + (1 - p) * ((-p).log1p() - (-q).log1p())
    assert 0 < float(q) < float(p) < 1e-10
    assert float(got.topk_reverse_kl) == pytest.approx(float(truth), rel=1e-4, abs=0)


@pytest.mark.parametrize("tokens", [7])
def test_chunks_of_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from sgcd_kernels.backends.triton import topk

    c = case(20, 8, 150, torch.float32)
    whole = linear_divergence(*on(c, "triton"), features=("tv",), top_k=6, impl="triton")
    monkeypatch.setattr(topk, "chunk_size", lambda *_: tokens)
    for mine, want in zip(linear_divergence(*on(c, "triton"), features=("tv",), top_k=6, impl="triton"), whole):
        if want is not None:
            torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-6)
