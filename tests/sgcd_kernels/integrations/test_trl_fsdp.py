"""The head's gradient under FSDP2, which leaves a head that is a unit of its own in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytest.importorskip("trl", reason="trl is not installed (it needs Python 3.11)")
pytest.importorskip("datasets", reason="datasets is not installed")

from sgcd_kernels.integrations.trl.head import LinearHead
from tests.sgcd_kernels.integrations import trl_world as world

IDS = torch.arange(6, 22).view(2, 8)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(ids, labels=ids, fused_lm_head=True).log_probs.sum()
    return loss


def shard_worker(rank: int, folder: str) -> None:
    """Each rank has one of the two rows, so that FSDP's mean is half the gradient of both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for own_unit in (False, True):
        model = world.model()
        LinearHead(model, temperature=0.7)
        for unit in [*model.model.layers, *([model.lm_head] if own_unit else []), model]:
            fully_shard(unit, mesh=mesh)
        loss_of(model, IDS[rank : rank + 1]).backward()
        found[own_unit] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_mean_of_their_gradients(tmp_path: Path) -> None:
    mp.spawn(shard_worker, args=(str(tmp_path),), nprocs=2)
    model = world.model()
    LinearHead(model, temperature=0.7)
    (loss_of(model, IDS) / 2).backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    for own_unit, found in torch.load(tmp_path / "found.pt").items():
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-5, msg=f"{name}, {own_unit}")
