"""Vocab-sharded heads: two gloo processes give what one gives, for every op, on the torch, C++ and Triton backends."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sgcd_kernels import (
    CreditConfig,
    backend_status,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)
from sgcd_kernels.core.surrogate import LOSS_TYPES
from tests.sgcd_kernels.backends.cases import DEVICES

N, H, V, SPLIT = 12, 5, 70, 4  # shards of very different size
CU = torch.tensor([0, 5, N])
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
Group = dist.ProcessGroup | None
Results = dict[str, list[torch.Tensor]]


class Inputs:
    """Both heads on one rank's vocab ids, or on all; for Triton on the GPU if there is one, which both ranks share."""

    def __init__(self, impl: str, dtype: torch.dtype, vocab_ids: slice, group: Group) -> None:
        g = torch.Generator().manual_seed(0)
        device = DEVICES["triton"] if impl == "triton" else torch.device("cpu")
        self.x, self.t = ((torch.randn(N, H, generator=g) * 2).to(device, dtype) for _ in range(2))
        self.w, self.v = (torch.randn(V, H, generator=g).to(device, dtype)[vocab_ids] for _ in range(2))
        self.b = torch.randn(V, generator=g).to(device, dtype)[vocab_ids]
        self.y = torch.randint(V, (N,), generator=g).to(device)
        self.y[0], self.y[1], self.y[2] = V - 1, 0, -100  # of either rank's vocabulary, and none
        self.a, self.cu = torch.linspace(-1, 1, N, device=device), CU.to(device)
        self.options: dict[str, Any] = {"impl": impl, "group": group}

    def leaves(self) -> tuple[torch.Tensor, ...]:
        return tuple(x.clone().requires_grad_() for x in (self.x, self.w, self.b))


def with_gradients(i: Inputs, call: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """A loss, and its gradients in hidden (whole) and in weight and bias (this rank's rows)."""
    leaves = i.leaves()
    loss = call(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def everything(i: Inputs) -> Results:
    """Every op, its values and gradients."""
    t, y, a, more = i.t, i.y, i.a, i.options
    out: Results = {}

    def logprob(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        stats = linear_logprob(x, w, y, bias=b, temperature=0.7, **more)
        return (stats.logp * torch.arange(N, device=x.device)).sum() + stats.entropy.sum() + stats.lse.sum() / 2

    def policy(loss_type: str) -> Callable[..., torch.Tensor]:
        old = torch.full((N,), -4.0, device=i.x.device)
        given = {"old_logp": old, "ref_logp": old, "beta": 0.1, "cu_seqlens": i.cu, "loss_type": loss_type, **more}
        return lambda x, w, b: linear_policy_loss(x, w, y, a, bias=b, softcap=9.0, **given)[0]

    def distill(kind: str, own: bool) -> Callable[..., torch.Tensor]:
        teacher = i.v if own else None
        given = {"kind": kind, "beta": 0.3, "mask": y != -100, **more}
        return lambda x, w, b: linear_distill_loss(x, w, t, teacher, bias=b, **given)

    def sgcd(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return sgcd_loss(x, w, y, t, a, i.cu, bias=b, config=CreditConfig(d_floor=0.01), **more)[0]

    out["logprob"] = with_gradients(i, logprob)
    for loss_type in LOSS_TYPES:
        out[loss_type] = with_gradients(i, policy(loss_type))
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        for own in (False, True):
            out[f"{kind} own={own}"] = with_gradients(i, distill(kind, own))
    out["sgcd"] = with_gradients(i, sgcd)
    for name, teacher, k in (("shared", None, 3), ("own", i.v, V - 1)):  # more vocab ids than the small shard has
        stats = linear_divergence(i.x, i.w, y, t, teacher, features=("jsd", "tv"), beta=0.3, top_k=k, **more)
        out[f"divergence {name}"] = [x for x in stats if x is not None]
    return out


def chunks_of_tokens(rank: int, i: Inputs) -> None:
    """Ranks agree how many tokens to take at a time where each by itself would take another number."""
    from sgcd_kernels.backends.triton import topk

    whole = linear_divergence(i.x, i.w, i.y, i.t, top_k=3, **i.options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "chunk_size", lambda *sizes: 3 + 2 * rank)
        chunked = linear_divergence(i.x, i.w, i.y, i.t, top_k=3, **i.options)
    assert chunked.topk_reverse_kl is not None and whole.topk_reverse_kl is not None
    torch.testing.assert_close(chunked.topk_reverse_kl, whole.topk_reverse_kl, rtol=1e-5, atol=1e-5)


def worker(rank: int, folder: str, impl: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    vocab_ids = slice(0, SPLIT) if rank == 0 else slice(SPLIT, V)
    i = Inputs(impl, dtype, vocab_ids, group)
    sharded, whole = everything(i), everything(Inputs(impl, dtype, slice(0, V), None))
    tolerance = TOLERANCE[dtype]
    for name, results in whole.items():
        for at, (got, want) in enumerate(zip(sharded[name], results, strict=True)):
            want = want[vocab_ids] if got.shape != want.shape else want
            scale = max(1.0, float(want.abs().max()))
            message = f"{name}, result {at}: {(got - want).abs().max()}"
            assert torch.allclose(got, want, rtol=tolerance, atol=tolerance * scale), message
    same = linear_divergence(i.x, i.w, i.y, i.x, features=("jsd", "tv"), top_k=3, **i.options)
    for field in ("reverse_kl", "forward_kl", "jsd", "tv", "topk_reverse_kl", "topk_forward_kl"):
        assert (getattr(same, field) == 0).all(), field
    if impl == "triton":
        chunks_of_tokens(rank, i)
    with pytest.raises(ValueError, match="targets holds 70, needs 0 <= y < 70"):
        linear_logprob(i.x, i.w, torch.full((N,), V, device=i.x.device), **i.options)
    with pytest.raises(ValueError, match=r"top_k is 71, needs an integer in \[1, 70\]"):
        linear_divergence(i.x, i.w, i.y, i.t, top_k=V + 1, **i.options)
    what_travels(i)
    if dtype == torch.float32 and i.x.device.type == "cpu" and backend_status()["cpp"].usable:
        the_cpp_kernels(i, group)
    dist.destroy_process_group()


def what_travels(i: Inputs) -> None:
    """The numbers that are reduced over the ranks, as docs/parallel.md counts them."""
    x, w, _ = i.leaves()
    scored = int((i.y != -100).sum())
    sgcd = {"config": CreditConfig(d_floor=0.01), **i.options}
    teacher = (i.y, i.t, i.a, i.cu)
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "a head": (5, lambda: linear_logprob(i.x, i.w, i.y, **i.options)),
        "a scoring pass": (13, lambda: linear_divergence(i.x, i.w, i.y, i.t, i.v, **i.options)),
        "sgcd": (14, lambda: sgcd_loss(x, w, *teacher, **sgcd)),
        "without reuse_lse": (18, lambda: sgcd_loss(x, w, *teacher, reuse_lse=False, **sgcd)),
    }
    reduced = []
    with pytest.MonkeyPatch.context() as patch:
        all_reduce = dist.all_reduce
        patch.setattr(
            dist, "all_reduce", lambda t, *args, **kw: (reduced.append(t.numel()), all_reduce(t, *args, **kw))
        )
        for name, (numbers, call) in calls.items():
            reduced.clear()
            call()
            gradient = 0 if numbers in (5, 13) else reduced.pop()
            assert gradient in (0, scored * H, N * H), name
            assert sum(reduced) == numbers * scored, (name, reduced)


def the_cpp_kernels(i: Inputs, group: Group) -> None:
    """They are what "auto" takes here; and what they cannot do over ranks they refuse before the first product."""
    if i.options["impl"] == "auto":
        by_name = i.options | {"impl": "cpp"}
        for call in (
            lambda o: linear_logprob(i.x, i.w, i.y, **o),
            lambda o: linear_divergence(i.x, i.w, i.y, i.t, i.v, **o),
            lambda o: linear_policy_loss(*i.leaves()[:2], i.y, i.a, loss_type="dapo", **o)[:1],
        ):
            assert all(torch.equal(a, b) for a, b in zip(call(i.options), call(by_name)) if a is not None)
    for kind in ("reverse_kl", "jsd"):
        with pytest.raises(ValueError, match="cannot run distill_backward here: it has none for vocab-sharded"):
            linear_distill_loss(i.x, i.w, i.t, kind=kind, impl="cpp", group=group)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("auto", torch.float64), ("auto", torch.float32), ("triton", torch.float32)],
    ids=["torch", "cpp", "triton"],  # which of them "auto" takes
)
def test_two_shards_equal_one(impl: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if impl == "triton":
        pytest.importorskip("triton")
    mp.spawn(worker, args=(str(tmp_path), impl, dtype), nprocs=2)
