"""Vocab-sharded heads: two gloo processes give what one gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sgcd_kernels import linear_divergence, linear_logprob, linear_policy_loss

N, H, V, SPLIT = 12, 5, 70, 30  # shards of different size


def data() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x, t, w = (torch.randn(n, H, dtype=torch.float64, generator=g) * 3 for n in (N, N, V))
    y = torch.randint(V, (N,), generator=g)
    y[2] = -100
    return x, t, w, y


def policy(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss, metrics = linear_policy_loss(x, w, y, torch.linspace(-1, 1, N), loss_type="dapo", group=group)
    return [loss.detach(), metrics["entropy"], *torch.autograd.grad(loss, (x, w))]


def logprob(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    stats = linear_logprob(x, w, y, temperature=0.7, group=group)
    total = (stats.logp * torch.arange(N)).sum() + stats.entropy.sum() + stats.lse.sum() / 2
    return [*(s.detach() for s in stats), *torch.autograd.grad(total, (x, w))]


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    x, t, w, y = data()
    rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, V)
    for name, op in (("logprob", logprob), ("policy", policy)):
        got, want = op(x, w[rows], y, group), op(x, w, y, None)
        want[-1] = want[-1][rows]
        for a, e in zip(got, want):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    sharded, whole = linear_divergence(x, w[rows], y, t, group=group), linear_divergence(x, w, y, t)
    for a, e in zip(sharded[:9], whole[:9]):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    same = linear_divergence(x, w[rows], y, x, group=group)
    assert (same.reverse_kl == 0).all()
    for options in ({"features": ("jsd",)}, {"top_k": 3}):
        with pytest.raises(ValueError, match=re.escape("group does not support features or top_k")):
            linear_divergence(x, w[rows], y, t, group=group, **options)
    with pytest.raises(ValueError, match="targets holds 70, needs 0 <= y < 70"):
        linear_logprob(x, w[rows], y.clamp(min=0) * 0 + V, group=group)
    dist.destroy_process_group()


def test_two_shards_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
