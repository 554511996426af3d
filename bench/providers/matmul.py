"""The matmul baseline: an op's products with the head by torch.mm and nothing else; and the C++ backend's bare sweep.

Only tokens with a loss are multiplied, gathered beforehand; tokens go in blocks, so that the products need no more
memory than any careful implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import PRODUCTS, Case
from bench.inputs import Inputs
from bench.providers import Outputs, ours, provides
from sgcd_kernels import linear_logprob

BLOCK = 8192  # tokens


def multiply(hidden: Tensor, weight: Tensor, count: float) -> None:
    """`count` products of hidden [n, H] and weight [V, H]: one each of logits, d hidden, d weight; then logits."""
    logits: Tensor | None = None
    d_weight = torch.zeros_like(weight) if count >= 3 else None
    for x in torch.split(hidden, BLOCK):
        logits = torch.mm(x, weight.T, out=logits if logits is not None and len(logits) == len(x) else None)
        if d_weight is not None:
            torch.mm(logits, weight)
            d_weight.addmm_(logits.T, x)
    for _ in range(int(count) - (3 if count >= 3 else 1)):
        for x in torch.split(hidden, BLOCK):
            logits = torch.mm(x, weight.T, out=logits if logits is not None and len(logits) == len(x) else None)


@functools.lru_cache(maxsize=4)
def _gathered(hidden: Tensor, rows: Tensor) -> Tensor:
    """Gathered once, at the first call, which warms up; tensors are hashed by identity."""
    return hidden.detach()[rows]


def register(op: str) -> None:
    @provides(op, "matmul", bare=True)
    def matmul(i: Inputs, mode: str) -> Outputs:
        multiply(_gathered(i.hidden, i.rows), i.weight, PRODUCTS[op][mode])
        return {}


for name, products in PRODUCTS.items():
    if max(products.values()):
        register(name)


@functools.cache
def _matmul_sweep() -> Callable[..., object] | None:
    """The operator, which the first use of the backend loads; None where the extension was built without it."""
    linear_logprob(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), impl="cpp")
    return getattr(torch.ops.sgcd_kernels, "matmul_sweep", None)


def _sweep(hidden: Tensor, weight: Tensor, teacher: Tensor | None) -> Outputs:
    sweep = _matmul_sweep()
    assert sweep is not None  # refuses_sweep
    sweep(hidden, weight, teacher)
    return {}


def refuses_sweep(case: Case) -> str | None:
    if refusal := ours.refuses("cpp")(case):
        return refusal
    if case.mode != "forward":
        return "no bare sweep of a backward pass"
    if _matmul_sweep() is None:
        return "the extension has no matmul_sweep: SGCD_BUILD_BENCH=1 pip install --no-build-isolation -e . builds it"
    return None


@provides("logprob", "sweep", package="sgcd-kernels", refuses=refuses_sweep, bare=True)
def sweep_one(i: Inputs, mode: str) -> Outputs:
    """The C++ backend's tiles of logits, computed and dropped: what its own matrix products cost."""
    return _sweep(_gathered(i.hidden, i.rows), i.weight, None)


@provides("divergence", "sweep", package="sgcd-kernels", refuses=refuses_sweep, bare=True)
def sweep_two(i: Inputs, mode: str) -> Outputs:
    return _sweep(_gathered(i.hidden, i.rows), i.weight, _gathered(i.teacher, i.rows))
