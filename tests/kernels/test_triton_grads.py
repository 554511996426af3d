"""The Triton gradients against those of the reference in fp64, and the cut of their work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sgcd_kernels import linear_distill_loss, linear_divergence, linear_logprob, linear_policy_loss, reference
from tests.kernels.cpp_inputs import Case, case
from tests.kernels.triton_device import DEVICE

pytest.importorskip("triton")
F64 = torch.float64
Leaves = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill all fresh memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def leaves_of(c: Case, dtype: torch.dtype, device: str = "cpu") -> Leaves:
    bias = torch.linspace(-1, 1, c.w.shape[0]).to(c.w.dtype)
    return tuple(a.to(device, dtype).requires_grad_() for a in (c.x, c.w, bias))  # type: ignore[return-value]


def grads(loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], leaves: Leaves) -> Leaves:
    return tuple(g.cpu() for g in torch.autograd.grad(loss(*leaves), leaves))  # type: ignore[return-value]


def weights(n: int, device: torch.device) -> torch.Tensor:
    return torch.linspace(-1, 2, n, device=device)


LOGPROB = {"logp": (1, 0, 0), "lse": (0, 0, 1), "all": (1, 0.5, -0.3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 31), (16, 16, 32), (33, 17, 65), (40, 64, 300)])
@pytest.mark.parametrize("outputs", LOGPROB)
def test_logprob(shape: tuple[int, int, int], dtype: torch.dtype, outputs: str) -> None:
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
        extras = {"temperature": temperature.to(DEVICE), "softcap": 6.0}
        return total(linear_logprob(x, w, c.y.to(DEVICE), bias=b, impl="triton", **extras))  # type: ignore[arg-type]

    got = grads(ours, leaves_of(c, dtype, DEVICE))
    want, theirs = grads(plain, leaves_of(c, F64)), grads(plain, leaves_of(c, dtype))
    for a, e, p in zip(got, want, theirs):
        assert a.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2  # of the result to its dtype: with few values plain PyTorch may be lucky
        floor = 1e-6 + max(3e-6, rounding) * float(e.abs().max())
        assert float((a - e).abs().max()) <= 2 * float((p - e).abs().max()) + floor


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
def test_distillation(kind: str, dtype: torch.dtype, own: bool) -> None:
    c = case(40, 20, 150, dtype)
    tw = torch.randn(150, 20).to(dtype) / 4 if own else c.w
    formulas = {"reverse_kl": reference.kl, "forward_kl": lambda p, q: reference.kl(q, p), "jsd": reference.jsd}

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        q = reference.logits(c.t.to(w.dtype), tw.to(w.dtype), b.detach(), softcap=9.0)
        return (formulas[kind](reference.logits(x, w, b, softcap=9.0), q) * weights(40, x.device)).sum()

    def ours(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        teacher = (c.t.to(DEVICE), tw.to(DEVICE), b.detach()) if own else (c.t.to(DEVICE), None, None)
        options = {"kind": kind, "bias": b, "teacher_bias": teacher[2], "softcap": 9.0, "reduction": "none"}
        loss = linear_distill_loss(x, w, teacher[0], teacher[1], impl="triton", **options)  # type: ignore[arg-type]
        return (loss * weights(40, x.device)).sum()

    got = grads(ours, leaves_of(c, dtype, DEVICE))
    want, theirs = grads(plain, leaves_of(c, F64)), grads(plain, leaves_of(c, dtype))
    for a, e, p in zip(got, want, theirs):
        assert float((a - e).abs().max()) <= 2 * float((p - e).abs().max()) + 1e-5 * float(e.abs().max()) + 1e-6


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_policy_loss_with_masked_rows(loss_type: str) -> None:
    c = case(60, 24, 200, torch.float32)
    mask = torch.rand(60) > 0.3
    broken = c.x.clone()
    broken[~mask] = torch.nan
    cu = torch.tensor([0, 10, 35, 60])
    results = []
    for impl in ("triton", "torch"):
        x, w = (a.to(DEVICE).requires_grad_() for a in (broken.clone(), c.w.clone()))
        y, a, m = (a.to(DEVICE) for a in (c.y, weights(60, c.x.device), mask))
        loss, _ = linear_policy_loss(x, w, y, a, mask=m, cu_seqlens=cu, loss_type=loss_type, impl=impl)
        loss.backward()
        assert x.grad is not None and w.grad is not None and (x.grad[~m] == 0).all()
        results.append((loss.detach(), x.grad, w.grad))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_and_groups_do_not_change_the_result(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgcd_kernels.triton import grads as walk

    c = case(50, 24, 300, dtype)

    def run() -> tuple[torch.Tensor, ...]:
        def loss(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            stats = linear_logprob(x, w, c.y.to(DEVICE), bias=b, impl="triton")
            return (stats.logp * weights(50, x.device)).sum()

        return grads(loss, leaves_of(c, dtype, DEVICE))

    whole = run()
    monkeypatch.setattr(walk, "SLICE_MULTIPLE", 32)
    monkeypatch.setattr(walk, "WORKSPACE_BYTES", 9_000)
    cut = walk.cut_of(50, 24, 300, dtype.itemsize)
    assert cut.tokens < 50 and cut.words < 300
    for a, e in zip(run(), whole):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


def test_fp16_gradients_do_not_underflow() -> None:
    c = case(30, 16, 200, torch.float16)
    tiny = 1e-9 * weights(30, c.x.device)

    def loss(impl: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        def inner(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            y, a, old = c.y.to(x.device), tiny.to(x.device), None
            total, _ = linear_policy_loss(x, w, y, a, bias=b, old_logp=old, loss_type="dapo", impl=impl)
            return total * 1e9  # a loss scale, as GradScaler multiplies it in

        return inner

    got = grads(loss("triton"), leaves_of(c, torch.float16, DEVICE))
    want = grads(loss("torch"), leaves_of(c, F64))
    for a, e in zip(got, want):
        torch.testing.assert_close(a.double(), e, rtol=2e-3, atol=2e-3 * float(e.abs().max()))


@pytest.mark.parametrize(("weight", "hidden"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_master_weight_gets_an_fp32_gradient(weight: str, hidden: str) -> None:
    c = case(30, 16, 100, torch.bfloat16)
    x, w = c.x.to(DEVICE, getattr(torch, hidden)), c.w.to(DEVICE, getattr(torch, weight))
    x, w = x.requires_grad_(), w.requires_grad_()
    linear_logprob(x, w, c.y.to(DEVICE), impl="triton").logp.sum().backward()
    a, b = c.x.detach().double().requires_grad_(), c.w.detach().double().requires_grad_()
    reference.logprob(reference.logits(a, b), c.y)[0].sum().backward()
    assert w.grad is not None and x.grad is not None and w.grad.dtype == getattr(torch, weight)
    torch.testing.assert_close(w.grad.cpu().double(), b.grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(x.grad.cpu().double(), a.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_compute(n: int) -> None:
    x, w = torch.randn(n, 4, device=DEVICE, requires_grad=True), torch.randn(6, 4, device=DEVICE, requires_grad=True)
    targets = torch.full((n,), -100, device=DEVICE)
    linear_logprob(x, w, targets, impl="triton").logp.sum().backward()
    assert w.grad is not None and (w.grad == 0).all()
    assert x.grad is not None and x.grad.shape == (n, 4)


@pytest.mark.parametrize("width", [576, 1024, 2560, 4096, 8192])
@pytest.mark.parametrize("vocab", [49_152, 151_936, 248_320])
@pytest.mark.parametrize("n", [1, 1024, 16_384, 65_536])
@pytest.mark.parametrize("weight_cast", [False, True])
def test_workspace_keeps_to_its_budget(n: int, vocab: int, width: int, weight_cast: bool) -> None:
    from sgcd_kernels.triton import grads as walk
    from sgcd_kernels.triton.configs import config_for
    from sgcd_kernels.triton.launch import shares_of

    cut = walk.cut_of(n, width, vocab, 2, weight_cast)
    assert cut.bytes(width, 2, weight_cast) <= walk.WORKSPACE_BYTES
    assert cut.words >= 1024 and (cut.words % 256 == 0 or cut.words == vocab)
    config = config_for("pair_stats", 9, 2)
    shares = shares_of(n, vocab, config, 132 * config.programs)
    partials = shares.count * 11 * n * 4
    assert partials * 3 <= walk.WORKSPACE_BYTES  # and what merging makes of them


def worker(rank: int, folder: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    for dtype in (torch.float32, torch.bfloat16):
        c = case(20, 8, 90, dtype)
        rows = slice(0, 38) if rank == 0 else slice(38, 90)
        whole, part = linear_divergence(*c, impl="triton"), None
        part = linear_divergence(c.x, c.w[rows], c.y, c.t, impl="triton", group=group)
        for a, e in zip(part[:9], whole[:9]):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-6)
        results = []
        for w, g in ((c.w[rows], group), (c.w, None)):
            x, w = c.x.clone().requires_grad_(), w.clone().requires_grad_()
            loss, _ = linear_policy_loss(x, w, c.y, weights(20, x.device), loss_type="dapo", impl="triton", group=g)
            loss.backward()
            results.append((loss.detach(), x.grad, w.grad if g is not None else w.grad[rows]))  # type: ignore[index]
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for a, e in zip(*results):
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * float(e.abs().max()))
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo and the interpreter: two processes on the CPU")
def test_two_shards_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
