"""torch.compile and opcheck with the Triton backend inside the ops; `test_compile.py` does the same for the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sgcd_kernels import (
    CreditConfig,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)
from tests.sgcd_kernels.backends.cases import DEVICES

pytest.importorskip("triton")
N, H, V = 12, 8, 70
Tensors = dict[str, torch.Tensor]
Op = Callable[[Tensors], tuple[torch.Tensor, ...]]


def tensors(n: int = N, dtype: torch.dtype = torch.float32) -> Tensors:
    g, device = torch.Generator().manual_seed(n), DEVICES["triton"]
    x, w, t = (torch.randn(*shape, generator=g).to(device, dtype) for shape in ((n, H), (V, H), (n, H)))
    y, a = torch.randint(V, (n,), generator=g), torch.randn(n, generator=g)
    y[3] = -100
    b = torch.randn(V, generator=g).to(device, dtype)
    given = {"y": y, "a": a, "old": -4 + a, "cu": torch.tensor([0, n // 3, n])}
    leaves = {"x": x.requires_grad_(), "w": w.requires_grad_(), "b": b.requires_grad_(), "t": t}
    return leaves | {name: value.to(device) for name, value in given.items()}


def policy(i: Tensors) -> tuple[torch.Tensor, ...]:
    options: dict[str, Any] = {"old_logp": i["old"], "ref_logp": i["old"], "beta": 0.1, "impl": "triton"}
    loss, metrics = linear_policy_loss(i["x"], i["w"], i["y"], i["a"], bias=i["b"], cu_seqlens=i["cu"], **options)
    return loss, *metrics.values()


def divergence(i: Tensors) -> tuple[torch.Tensor, ...]:
    options: dict[str, Any] = {"features": ("jsd", "tv"), "top_k": 4, "impl": "triton"}
    stats = linear_divergence(i["x"], i["w"], i["y"], i["t"], bias=i["b"], **options)
    return tuple(x for x in stats if x is not None)


def distill(i: Tensors, kind: str) -> tuple[torch.Tensor, ...]:
    return (linear_distill_loss(i["x"], i["w"], i["t"], bias=i["b"], kind=kind, reduction="none", impl="triton"),)


def sgcd(i: Tensors) -> tuple[torch.Tensor, ...]:
    config = CreditConfig(d_floor=0.01)
    loss, metrics = sgcd_loss(i["x"], i["w"], i["y"], i["t"], i["a"], i["cu"], config=config, impl="triton")
    return loss, *metrics.values()


OPS: dict[str, Op] = {
    "logprob": lambda i: tuple(linear_logprob(i["x"], i["w"], i["y"], bias=i["b"], impl="triton")),
    "divergence": divergence,
    "policy": policy,
    "reverse_kl": partial(distill, kind="reverse_kl"),
    "jsd": partial(distill, kind="jsd"),
    "sgcd": sgcd,
}


def results(op: Op, i: Tensors) -> list[torch.Tensor]:
    out = op(i)
    seeds = [x for x in out if x.requires_grad]
    if not seeds:
        return list(out)
    leaves = [x for x in i.values() if x.requires_grad]
    grads = torch.autograd.grad(seeds, leaves, [torch.full_like(x, 1 / 3) for x in seeds], allow_unused=True)
    return [x.detach() for x in out] + [g for g in grads if g is not None]


@pytest.mark.parametrize("op", OPS)
def test_one_graph_and_the_bits_of_eager(op: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op], backend="aot_eager", fullgraph=True, dynamic=True)
    for n, dtype in ((12, torch.float32), (15, torch.float32), (12, torch.bfloat16)):
        i = tensors(n, dtype)
        got, want = results(compiled, i), results(OPS[op], i)
        assert len(got) == len(want)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want))


class OpCalls(TorchFunctionMode):
    """Every call of one of our ops, with its flat arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "sgcd_kernels":
            recording = torch.is_grad_enabled()  # not everywhere: some ops have no gradient
            self.found.append((func, tuple(a if recording or not torch.is_tensor(a) else a.detach() for a in args)))
        return func(*args, **(kwargs or {}))


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    """Of each op that a call, and its backward pass, makes."""
    i = tensors()
    i["a"] = -i["a"].abs()  # a loss > 0 has the slope 1 under opcheck: see ops/test_compile.py
    with OpCalls() as calls:
        results(OPS[op], i)
    assert calls.found
    for func, arguments in calls.found:
        torch.library.opcheck(func, arguments, test_utils=CHECKS)
