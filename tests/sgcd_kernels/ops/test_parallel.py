"""docs/parallel.md by two gloo processes: a head sharded by FSDP2, or by vocabulary, gives what one process gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sgcd_kernels import CreditConfig, FusedLinearSGCDLoss, linear_policy_loss

B, T, H, V = 4, 6, 8, 40
CREDIT = {"config": CreditConfig(d_floor=0.01), "loss_type": "dapo"}
FP64, FP32 = torch.float64, torch.float32  # by the torch backend, and by the C++ kernels where they are built
TOLERANCE = {FP64: {"rtol": 1e-12, "atol": 1e-14}, FP32: {"rtol": 2e-5, "atol": 1e-7}}


class Policy(nn.Module):
    """A decoder and a head that tells the loss instead of logits: the loss is called where the head is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, H))
        self.head = Head()

    def forward(self, x: Tensor, reference: Tensor, *batch: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self.decoder(x + reference)
        loss: Tensor = self.head(self.decoder(x), teacher, *batch)
        return loss


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, H))
        self.bias = nn.Parameter(torch.randn(V) / 10)
        self.criterion = FusedLinearSGCDLoss(**CREDIT)

    def forward(self, hidden: Tensor, teacher: Tensor, targets: Tensor, advantages: Tensor, items: Tensor) -> Tensor:
        options = {"bias": self.bias, "num_items_in_batch": items}
        return self.criterion(hidden, self.weight, targets, teacher, advantages, **options)[0]


def policy(dtype: torch.dtype = FP64) -> Policy:
    torch.manual_seed(0)
    return Policy().to(dtype)


def data(dtype: torch.dtype = FP64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    x, reference = (torch.randn(B, T, H, generator=g, dtype=FP64).to(dtype) for _ in range(2))
    targets = torch.randint(V, (B, T), generator=g)
    targets[0, 4:] = -100  # sequences of different length, so that ranks have different numbers of tokens
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.7], dtype=dtype)
    return x, reference, targets, advantages, (targets != -100).sum()


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items() if g is not None}


def single_process(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    model = policy(dtype)
    loss = model(*data(dtype))
    loss.backward()
    return loss.detach(), grads(model)


def fsdp(rank: int, own_unit: bool, dtype: torch.dtype) -> None:
    """Each rank has half of the sequences; `num_items_in_batch` is of all, times what averaging divides by."""
    want_loss, want = single_process(dtype)
    model = policy(dtype)
    mesh = init_device_mesh("cpu", (2,))
    if own_unit:
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.head.weight, DTensor) and len(model.head.weight.to_local()) == V // 2
    x, reference, targets, advantages, items = data(dtype)
    mine = slice(0, 2) if rank == 0 else slice(2, 4)
    total = torch.zeros((), dtype=dtype)
    for micro in range(2):  # gradients accumulate over micro-batches
        rows = slice(mine.start + micro, mine.start + micro + 1)
        model.set_requires_gradient_sync(micro == 1)
        loss = model(x[rows], reference[rows], targets[rows], advantages[rows], items / 2)
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total, dist.ReduceOp.SUM)
    torch.testing.assert_close(total / 2, want_loss, **TOLERANCE[dtype])
    torch.testing.assert_close(grads(model), want, **TOLERANCE[dtype])


def vocab(rank: int, dtype: torch.dtype) -> None:
    """Each rank has half of the vocabulary and every token; a DTensor head is its local part and its mesh's group."""
    want_loss, want = single_process(dtype)
    x, reference, targets, advantages, items = data(dtype)
    model, mesh = policy(dtype), init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Shard(0)]))
    bias = nn.Parameter(distribute_tensor(model.head.bias.detach(), mesh, [Shard(0)]))
    criterion = FusedLinearSGCDLoss(**CREDIT, group=mesh.get_group())
    with torch.no_grad():
        teacher = model.decoder(x + reference)
    options = {"bias": bias.to_local(), "num_items_in_batch": items}
    loss, _ = criterion(model.decoder(x), weight.to_local(), targets, teacher, advantages, **options)
    loss.backward()
    torch.testing.assert_close(loss.detach(), want_loss, **TOLERANCE[dtype])
    found = grads(model) | {"head.weight": weight.grad.full_tensor(), "head.bias": bias.grad.full_tensor()}
    torch.testing.assert_close(found, want, **TOLERANCE[dtype])
    with pytest.raises(ValueError, match=re.escape("weight is a DTensor, needs a plain tensor: under FSDP2 call from")):
        criterion(model.decoder(x), weight, targets, teacher, advantages, **options)
    with pytest.raises(ValueError, match="bias is a DTensor, needs a plain tensor"):
        criterion(model.decoder(x), weight.to_local(), targets, teacher, advantages, bias=bias)


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for dtype in (FP64, FP32):
        fsdp(rank, own_unit=False, dtype=dtype)
        fsdp(rank, own_unit=True, dtype=dtype)
        vocab(rank, dtype)
    dist.destroy_process_group()


def test_sharded_heads_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)


def test_the_single_process_run_has_credit_in_it() -> None:
    """Else the two-process test would compare plain GRPO."""
    model, (x, reference, targets, advantages, _) = policy(), data()
    hidden, teacher = model.decoder(x), model.decoder(x + reference).detach()
    loss, metrics = model.head.criterion(hidden, model.head.weight, targets, teacher, advantages, bias=model.head.bias)
    plain, _ = linear_policy_loss(
        hidden, model.head.weight, targets, advantages, bias=model.head.bias, loss_type="dapo"
    )
    assert metrics["credit/mean_weight"] > 1.05 and abs(loss - plain) > 1e-3
