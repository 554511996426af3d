"""Rows in which one vocab id has nearly all the probability, and logits with a large common part.

In both, a log-sum-exp rounded to one fp32 number, or a p near 1, has lost what a gradient is made of. The truth is the
formula in fp64, on logits that fp32 holds exactly: they are the bias, beside hidden states of 0.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sgcd_kernels import linear_distill_loss, linear_divergence, linear_logprob, linear_policy_loss, reference
from sgcd_kernels.backends.registry import backend_status
from sgcd_kernels.core.statistics import HeadStats, PairStats
from tests.sgcd_kernels.backends.cases import DEVICES

IMPLS = [impl for impl in ("torch", "cpp", "triton") if backend_status()[impl].usable]
OFFSETS = (0.0, 16_384.0, -16_384.0, 1e6)
VOCABS = (2, 50, 1000)


def device_of(impl: str) -> str:
    return DEVICES.get(impl, "cpu")


def peaked(vocab: int, others: float, offset: float, seed: int = 0) -> Tensor:  # [V]
    """Logits whose vocab id 0 has a probability of about 1 - others."""
    g = torch.Generator().manual_seed(seed)
    z = math.log(others / (vocab - 1)) + 0.5 * torch.randn(vocab, generator=g)
    z[0] = 0.0
    return (z.double() + offset).float()


def head(impl: str, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets of one token whose logits are the bias"""
    device = device_of(impl)
    zeros = torch.zeros(1, 16, dtype=dtype, device=device), torch.zeros(vocab, 16, dtype=dtype, device=device)
    return *zeros, torch.zeros(1, dtype=torch.long, device=device)


def rounding(impl: str) -> float:
    """What a log-prob may be off by, absolutely: Triton's kernels sum the tile that holds the 1 in fp32."""
    return 2.5e-7 if impl == "triton" else 1e-30


def assert_near(got: Tensor, true: Tensor, relative: float = 4e-6, absolute: float = 1e-30) -> None:
    torch.testing.assert_close(got.detach().cpu().double(), true.double(), rtol=relative, atol=absolute)


def leaf(z: Tensor, impl: str) -> Tensor:
    return z.detach().clone().to(device_of(impl)).requires_grad_()


PEAKED = [
    (impl, vocab, offset, others)
    for impl in IMPLS
    for i, offset in enumerate(OFFSETS)
    for j, others in enumerate((1e-3, 1e-6, 1e-8))
    for k, vocab in enumerate(VOCABS)
    if impl != "triton" or (i + j + k) % 3 == 0  # every pair of values: its interpreter takes a second per case
]


@pytest.mark.parametrize(("impl", "vocab", "offset", "others"), PEAKED)
class TestPeaked:
    def test_log_prob_entropy_and_their_gradients(self, impl: str, vocab: int, offset: float, others: float) -> None:
        z = peaked(vocab, others, offset)
        x, w, y = head(impl, vocab)
        bias, true_z = leaf(z, impl), z.double().requires_grad_()
        stats = linear_logprob(x, w, y, bias=bias, impl=impl)
        logp, entropy, _ = reference.logprob(true_z[None], torch.zeros(1, dtype=torch.long))
        for got, true in ((stats.logp, logp), (stats.entropy, entropy)):
            assert_near(got, true, absolute=rounding(impl))
            (grad,) = torch.autograd.grad(got, bias, retain_graph=True)
            (true_grad,) = torch.autograd.grad(true, true_z, retain_graph=True)
            # An entropy's gradient is 0 at one probability; near it, an error of p is all of the gradient.
            size = true_grad.abs() + true_z.softmax(0).detach() * 1e-2 * (got is stats.entropy)
            assert ((grad.cpu() - true_grad).abs() < 4e-6 * size + rounding(impl)).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_policy_loss(self, impl: str, vocab: int, offset: float, others: float, dtype: torch.dtype) -> None:
        z = peaked(vocab, others, offset)
        x, w, y = head(impl, vocab, dtype)
        x, w = x.requires_grad_(), w.requires_grad_()
        true_z = z.double().requires_grad_()
        true_logp = true_z.log_softmax(0)[0]
        (true_grad,) = torch.autograd.grad(-true_logp, true_z)
        exact_lse = true_z.detach().logsumexp(0, keepdim=True).to(device_of(impl))
        for given in ({}, {"lse": exact_lse}):
            bias = leaf(z, impl)
            loss, _ = linear_policy_loss(
                x, w, y, torch.ones(1, device=x.device), bias=bias, loss_type="bnpo", impl=impl, **given
            )
            (grad,) = torch.autograd.grad(loss, bias)
            # With products of bf16 the gradients of the logits are rounded to bf16; fp64 has its own rounding.
            relative, absolute = (
                4e-6 if dtype == torch.float32 else 2e-2,
                abs(offset) * 2**-52 if given else rounding(impl),
            )
            torch.testing.assert_close(grad.cpu().double(), true_grad, rtol=relative, atol=absolute)

    @pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
    def test_distillation(self, impl: str, vocab: int, offset: float, others: float, kind: str) -> None:
        z_p, z_q = peaked(vocab, others, offset), peaked(vocab, 3 * others, offset, seed=1)
        x, w, _ = head(impl, vocab)
        bias, true_p = leaf(z_p, impl), z_p.double().requires_grad_()
        loss = linear_distill_loss(
            x, w, x.detach(), w, bias=bias, teacher_bias=z_q.to(x.device), kind=kind, impl=impl, reduction="sum"
        )
        p, q = true_p[None], z_q.double()[None]
        true = {
            "forward_kl": lambda: reference.kl(q, p),
            "reverse_kl": lambda: reference.kl(p, q),
            "jsd": lambda: reference.jsd(p, q),
        }[kind]().sum()
        (grad,), (true_grad,) = torch.autograd.grad(loss, bias), torch.autograd.grad(true, true_p)
        each = 2 * rounding(impl)  # the log-probs of two heads
        assert_near(loss, true, 2e-5, each)
        # Absolutely, at the size of the row's largest: a probability of which the gradient is 0 has no relative error.
        assert float((grad.cpu() - true_grad).abs().max()) < 2e-5 * float(true_grad.abs().max()) + each


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_common_offset_changes_no_divergence(impl: str, offset: float) -> None:
    g = torch.Generator().manual_seed(0)
    # Multiples of 1/16: exact at every offset.
    z_p, z_q = ((3 * torch.randn(300, generator=g)).mul(16).round() / 16 for _ in range(2))
    x, w, y = head(impl, 300)
    stats = linear_divergence(
        x, w, y, x, w, bias=(z_p + offset).to(x.device), teacher_bias=(z_q + offset).to(x.device),
        features=("jsd", "tv"), top_k=5, impl=impl,
    )  # fmt: skip
    p, q = z_p.double()[None], z_q.double()[None]
    reverse, forward = reference.topk_kl(p, q, torch.zeros(1, dtype=torch.long), 5)
    true = {
        "student_logp": p.log_softmax(1)[:, 0],
        "teacher_entropy": reference.logprob(q, torch.zeros(1, dtype=torch.long))[1],
        "reverse_kl": reference.kl(p, q),
        "forward_kl": reference.kl(q, p),
        "bhattacharyya": reference.bhattacharyya(p, q),
        "jsd": reference.jsd(p, q),
        "tv": reference.tv(p, q),
        "topk_reverse_kl": reverse,
        "topk_forward_kl": forward,
    }
    for name, value in true.items():
        assert_near(getattr(stats, name), value, 4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif("cpp" not in IMPLS, reason="the compiled backend is not usable")
def test_a_large_vocabulary_spread_over_many_tiles(dtype: torch.dtype) -> None:
    """All that is left to 50,000 others is less than the rounding of the 1 beside each tile's share."""
    vocab = 50_000
    z = peaked(vocab, 1e-5, 0.0)
    for impl in ("torch", "cpp"):
        x, w, y = head(impl, vocab, dtype)
        bias, true_z = leaf(z, impl), z.double().requires_grad_()
        (grad,) = torch.autograd.grad(linear_logprob(x, w, y, bias=bias, impl=impl).logp, bias)
        (true,) = torch.autograd.grad(true_z.log_softmax(0)[0], true_z)
        assert_near(grad, true, 4e-6 if dtype == torch.float32 else 1e-2)


def test_statistics_of_parts_merge_exactly() -> None:
    """In any order, with empty parts, and with the maximum in several of them."""
    g = torch.Generator().manual_seed(0)
    z = peaked(64, 1e-7, 0.0).repeat(4, 1)
    z[1, 40] = 0.0  # twice the maximum
    z[2] = torch.randn(64, generator=g)
    z[3, :16] = -math.inf
    z = torch.cat([z, torch.full((4, 16), -math.inf)], 1)
    y = torch.tensor([0, 40, 3, 20])
    true = reference.logprob(z.double(), y)
    for at in (slice(None), torch.arange(5).flip(0)):
        blocks = [z[:, i * 16 : (i + 1) * 16] for i in range(5)]
        start = HeadStats.start(4, z)
        parts = torch.stack([torch.stack(start.with_targets(b, y, i * 16).updated(b)[0]) for i, b in enumerate(blocks)])
        order = torch.arange(5)[at]
        in_turn = start
        for i in order.tolist():
            in_turn = in_turn.with_targets(blocks[i], y, i * 16).updated(blocks[i])[0]
        for stats in (in_turn, HeadStats.of_splits(parts[at])):
            for got, expected in zip(stats.results(), true):
                assert_near(got, expected, 1e-6)
    pair = PairStats.start(4, z).updated(z, z).results()
    assert torch.equal(pair["bhattacharyya"], torch.ones(4)) and torch.equal(pair["reverse_kl"], torch.zeros(4))


FORBIDDEN = {
    "student": ([1, 2], []),
    "teacher": ([], [1, 2]),
    "both": ([1, 2], [1, 2]),
    "one each": ([1], [2]),
    "the target": ([0], [0]),
    "all but one of the student": ([i for i in range(20) if i != 3], []),
    "all but one of the teacher": ([], [i for i in range(20) if i != 3]),
    "all but one": ([i for i in range(20) if i != 3], [i for i in range(20) if i != 3]),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("where", FORBIDDEN)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
class TestForbidden:
    def logits(self, where: str) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        z_p, z_q = torch.randn(20, generator=g), torch.randn(20, generator=g)
        for z, ids in zip((z_p, z_q), FORBIDDEN[where], strict=True):
            z[ids] = -math.inf
        return z_p, z_q

    @pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
    def test_gradients_are_finite(self, impl: str, where: str, temperature: float, kind: str) -> None:
        """That of an infinite KL(p || q), which would be inf - inf, is 0; all others are those of the formula."""
        z_p, z_q = self.logits(where)
        x, w, _ = head(impl, 20)
        x = torch.cat([x, x])  # a row beside it keeps its gradient
        w[:, 0] = torch.linspace(-1, 1, 20)
        x[1, 0] = 1.0
        x, bias = x.requires_grad_(), leaf(z_p, impl)
        loss = linear_distill_loss(
            x, w, x.detach(), w, bias=bias, teacher_bias=z_q.to(x.device), kind=kind, impl=impl, reduction="none",
            temperature=temperature,
        )  # fmt: skip
        p, q = (z.double() / temperature for z in (z_p, z_q))
        true = {
            "forward_kl": lambda: reference.kl(q[None], p[None]),
            "reverse_kl": lambda: reference.kl(p[None], q[None]),
            "jsd": lambda: reference.jsd(p[None], q[None]),
        }[kind]()
        assert_near(loss[:1], true, 1e-5)
        finite = torch.where(loss.isfinite(), loss, 0.0).sum()  # leaving out a row leaves no NaN behind
        d_hidden, d_bias = torch.autograd.grad(finite, (x, bias))
        assert d_hidden.isfinite().all() and d_bias.isfinite().all()
        d_hidden, d_bias = torch.autograd.grad(
            linear_distill_loss(
                x, w, x.detach(), w, bias=bias, teacher_bias=z_q.to(x.device), kind=kind, impl=impl, reduction="sum",
                temperature=temperature,
            ),
            (x, bias),
        )  # fmt: skip
        assert d_hidden.isfinite().all() and d_bias.isfinite().all()
        if kind == "reverse_kl" and math.isinf(float(true)):
            assert not d_hidden.any() and not d_bias.any()
        elif kind == "forward_kl":
            expected = (p.softmax(0) - q.softmax(0)) / temperature
            got = torch.autograd.grad(
                linear_distill_loss(
                    x[:1].detach(), w, x[:1].detach(), w, bias=bias, teacher_bias=z_q.to(x.device), kind=kind,
                    impl=impl, reduction="sum", temperature=temperature,
                ),
                bias,
            )[0]  # fmt: skip
            torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-7)

    def test_divergences(self, impl: str, where: str, temperature: float) -> None:
        z_p, z_q = self.logits(where)
        x, w, y = head(impl, 20)
        stats = linear_divergence(
            x, w, y, x, w, bias=z_p.to(x.device), teacher_bias=z_q.to(x.device), temperature=temperature,
            features=("jsd", "tv"), top_k=4, impl=impl,
        )  # fmt: skip
        p, q = z_p.double()[None] / temperature, z_q.double()[None] / temperature
        true = {
            "student_logp": p.log_softmax(1)[:, 0],
            "reverse_kl": reference.kl(p, q),
            "forward_kl": reference.kl(q, p),
            "bhattacharyya": reference.bhattacharyya(p, q),
            "jsd": reference.jsd(p, q),
            "tv": reference.tv(p, q),
        }
        for name, value in true.items():
            torch.testing.assert_close(getattr(stats, name).cpu().double(), value, rtol=1e-5, atol=2e-7, msg=name)
        for name, full in (("topk_reverse_kl", stats.reverse_kl), ("topk_forward_kl", stats.forward_kl)):
            value = getattr(stats, name)
            assert not value.isnan().any() and (value <= full + 1e-5).all(), name
