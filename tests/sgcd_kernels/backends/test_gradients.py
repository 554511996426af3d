"""The gradients of both compiled backends against those of the reference in fp64.

They are fp32 at best, too coarse for gradcheck's one coordinate at a time: the fp64 reference stands in for
differences.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sgcd_kernels import linear_distill_loss, linear_divergence, linear_logprob, linear_policy_loss, reference
from tests.sgcd_kernels.backends.cases import DEVICES, IMPLS, case, grads, leaves_of, on, skip_if_slow, weights

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.parametrize("impl", IMPLS, indirect=True)]
F64 = torch.float64
SHAPES = [
    (1, 1, 1), (3, 5, 31), (3, 5, 63), (16, 16, 32), (33, 17, 65), (40, 64, 300), (65, 33, 129), (70, 100, 65),
    (130, 64, 1100),
]  # fmt: skip
LOGPROB = {"logp": (1, 0, 0), "lse": (0, 0, 1), "all": (1, 0.5, -0.3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outputs", LOGPROB)
def test_logprob(impl: str, shape: tuple[int, int, int], dtype: torch.dtype, outputs: str) -> None:
    skip_if_slow(impl, shape[0], shape[2])
    c = case(*shape, dtype)
    n = shape[0]
    temperature = torch.linspace(0.5, 1.5, n)

    def total(stats: tuple[torch.Tensor, ...]) -> torch.Tensor:
        pairs = zip(LOGPROB[outputs], stats)
        return sum(k * (s * weights(n, s.device)).sum() for k, s in pairs if k)  # type: ignore[return-value]

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z = reference.logits(x, w, b, temperature=temperature.to(x.dtype), softcap=6.0)
        return total(reference.logprob(z, c.y))

    def ours(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        extras = {"temperature": temperature.to(DEVICES[impl]), "softcap": 6.0}
        return total(linear_logprob(x, w, c.y.to(DEVICES[impl]), bias=b, impl=impl, **extras))  # type: ignore[arg-type]

    got = grads(ours, leaves_of(c, dtype, DEVICES[impl]))
    want, theirs = grads(plain, leaves_of(c, F64)), grads(plain, leaves_of(c, dtype))
    for a, e, p in zip(got, want, theirs):
        assert a.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2  # of the result to its dtype: with few values plain PyTorch may be lucky
        floor = 1e-6 + max(3e-6, rounding) * float(e.abs().max())
        assert float((a - e).abs().max()) <= 2 * float((p - e).abs().max()) + floor


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
def test_distillation(impl: str, kind: str, dtype: torch.dtype, own: bool) -> None:
    c = case(40, 20, 150, dtype)
    tw = torch.randn(150, 20).to(dtype) / 4 if own else c.w
    formulas = {"reverse_kl": reference.kl, "forward_kl": lambda p, q: reference.kl(q, p), "jsd": reference.jsd}

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        q = reference.logits(c.t.to(w.dtype), tw.to(w.dtype), b.detach(), softcap=9.0)
        return (formulas[kind](reference.logits(x, w, b, softcap=9.0), q) * weights(40, x.device)).sum()

    def ours(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        t, other = c.t.to(DEVICES[impl]), tw.to(DEVICES[impl]) if own else None
        options = {"kind": kind, "bias": b, "teacher_bias": b.detach() if own else None, "softcap": 9.0}
        loss = linear_distill_loss(x, w, t, other, reduction="none", impl=impl, **options)  # type: ignore[arg-type]
        return (loss * weights(40, x.device)).sum()

    got = grads(ours, leaves_of(c, dtype, DEVICES[impl]))
    want, theirs = grads(plain, leaves_of(c, F64)), grads(plain, leaves_of(c, dtype))
    for a, e, p in zip(got, want, theirs):
        assert float((a - e).abs().max()) <= 2 * float((p - e).abs().max()) + 1e-5 * float(e.abs().max()) + 1e-6


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_policy_loss_with_masked_rows(impl: str, loss_type: str) -> None:
    c = case(60, 24, 200, torch.float32)
    mask = torch.rand(60) > 0.3
    broken = c.x.clone()
    broken[~mask] = torch.nan
    cu = torch.tensor([0, 10, 35, 60])
    results = []
    for name in (impl, "torch"):
        x, w = (a.to(DEVICES[impl]).requires_grad_() for a in (broken.clone(), c.w.clone()))
        y, a, m = (a.to(DEVICES[impl]) for a in (c.y, weights(60, c.x.device), mask))
        loss, _ = linear_policy_loss(x, w, y, a, mask=m, cu_seqlens=cu, loss_type=loss_type, impl=name)
        loss.backward()
        assert x.grad is not None and w.grad is not None and (x.grad[~m] == 0).all()
        results.append((loss.detach(), x.grad, w.grad))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_fp16_gradients_do_not_underflow(impl: str) -> None:
    c = case(30, 16, 200, torch.float16)
    tiny = 1e-9 * weights(30, c.x.device)

    def loss(name: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        def inner(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            y, a, old = c.y.to(x.device), tiny.to(x.device), None
            total, _ = linear_policy_loss(x, w, y, a, bias=b, old_logp=old, loss_type="dapo", impl=name)
            return total * 1e9  # a loss scale, as GradScaler multiplies it in

        return inner

    got = grads(loss(impl), leaves_of(c, torch.float16, DEVICES[impl]))
    want = grads(loss("torch"), leaves_of(c, F64))
    for a, e in zip(got, want):
        torch.testing.assert_close(a.double(), e, rtol=2e-3, atol=2e-3 * float(e.abs().max()))


@pytest.mark.parametrize(("weight", "hidden"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_master_weight_gets_an_fp32_gradient(impl: str, weight: str, hidden: str) -> None:
    c = case(30, 16, 100, torch.bfloat16)
    x, w = c.x.to(DEVICES[impl], getattr(torch, hidden)), c.w.to(DEVICES[impl], getattr(torch, weight))
    x, w = x.requires_grad_(), w.requires_grad_()
    linear_logprob(x, w, c.y.to(DEVICES[impl]), impl=impl).logp.sum().backward()
    a, b = c.x.detach().double().requires_grad_(), c.w.detach().double().requires_grad_()
    reference.logprob(reference.logits(a, b), c.y)[0].sum().backward()
    assert w.grad is not None and x.grad is not None and w.grad.dtype == getattr(torch, weight)
    torch.testing.assert_close(w.grad.cpu().double(), b.grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(x.grad.cpu().double(), a.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_compute(impl: str, n: int) -> None:
    x, w = (
        torch.randn(n, 4, device=DEVICES[impl], requires_grad=True),
        torch.randn(6, 4, device=DEVICES[impl], requires_grad=True),
    )
    targets = torch.full((n,), -100, device=DEVICES[impl])
    linear_logprob(x, w, targets, impl=impl).logp.sum().backward()
    assert w.grad is not None and (w.grad == 0).all()
    assert x.grad is not None and x.grad.shape == (n, 4)


def worker(rank: int, folder: str, impl: str) -> None:
    """Both ranks share the GPU if there is one."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    for dtype in (torch.float32, torch.bfloat16):
        c = on(case(20, 8, 90, dtype), impl)
        rows = slice(0, 38) if rank == 0 else slice(38, 90)
        whole, part = linear_divergence(*c, impl=impl), None
        part = linear_divergence(c.x, c.w[rows], c.y, c.t, impl=impl, group=group)
        for a, e in zip(part[:9], whole[:9]):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-6)
        results = []
        for w, g in ((c.w[rows], group), (c.w, None)):
            x, w = c.x.clone().requires_grad_(), w.clone().requires_grad_()
            loss, _ = linear_policy_loss(x, w, c.y, weights(20, x.device), loss_type="dapo", impl=impl, group=g)
            loss.backward()
            results.append((loss.detach(), x.grad, w.grad if g is not None else w.grad[rows]))  # type: ignore[index]
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for a, e in zip(*results):
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * float(e.abs().max()))
    dist.destroy_process_group()


def test_two_shards_equal_one(impl: str, tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path), impl), nprocs=2)
