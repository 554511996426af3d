"""The workspace of the torch backend stays within its budget at any N and V: counted allocation by allocation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sgcd_kernels import linear_distill_loss, linear_divergence, linear_logprob, linear_policy_loss
from sgcd_kernels.backends.torch import blocks
from sgcd_kernels.core.lm_head import LMHead, Projection
from tests.sgcd_kernels.backends.cases import has_body, run_body

BUDGET = 1 << 20  # small, so that a small shape has far more logits than fit
N, H, V = 300, 16, 3000  # 3.6 MB of fp32 logits


class LiveBytes(TorchDispatchMode):
    """Follows the storages that ops make, inputs aside: the most bytes of them that were ever alive at one time."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in known}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        if has_body(func):
            with self:
                out = run_body(func, args)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def inputs(n: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x, w = torch.randn(n, H, dtype=dtype), torch.randn(v, H, dtype=dtype)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(v, (n,)), torch.randn(n, H, dtype=dtype)


Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]
OPS: dict[str, Call] = {
    "linear_logprob": lambda x, w, y, t: linear_logprob(x, w, y, impl="torch").logp.sum().backward(),
    "linear_divergence": lambda x, w, y, t: linear_divergence(
        x, w, y, t, features=("jsd", "tv"), top_k=10, impl="torch"
    ),
    "linear_policy_loss": lambda x, w, y, t: linear_policy_loss(
        x, w, y, t[:, 0].float(), loss_type="dapo", impl="torch"
    )[0].backward(),
    "linear_distill_loss": lambda x, w, y, t: linear_distill_loss(x, w, t, kind="jsd", impl="torch").backward(),
}


def peak(op: str, n: int, v: int, dtype: torch.dtype = torch.float32) -> int:
    """The most bytes alive at one time, less the gradients and their fp32 sums, which are results."""
    tensors = inputs(n, v, dtype)
    gc.collect()
    with LiveBytes(tensors) as counter:
        OPS[op](*tensors)
    results = sum(t.grad.nbytes for t in tensors[:2] if t.grad is not None)
    sums = 0 if op == "linear_divergence" or dtype == torch.float32 else 4 * n * H
    return counter.peak - results - sums


def test_the_wider_of_two_heads_sets_the_block_size() -> None:
    narrow = Projection(torch.zeros(N, H), LMHead(torch.zeros(V, H)))
    wide = Projection(torch.zeros(N, H, dtype=torch.float64), LMHead(torch.zeros(V, H, dtype=torch.float64)))
    pairs = ((narrow, wide), (wide, narrow), (wide, wide))
    assert len({blocks.plan(*pair, live=8, hidden_copies=2, weight_copies=3) for pair in pairs}) == 1


@pytest.mark.parametrize(
    ("op", "dtype"), [*((op, torch.float32) for op in OPS), ("linear_policy_loss", torch.bfloat16)]
)
def test_workspace_stays_in_its_budget(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.WORKSPACE_BYTES, "cpu", BUDGET)
    per_token = 80 * 4  # statistics: some 80 numbers per token, whatever V
    largest = peak(op, N, V, dtype)
    assert largest <= BUDGET + per_token * N
    assert largest >= BUDGET / 8, "the counter sees nothing, or the budget is not used"
    assert peak(op, N, 4 * V, dtype) <= BUDGET + per_token * N
    assert peak(op, 4 * N, V, dtype) <= BUDGET + per_token * 4 * N
