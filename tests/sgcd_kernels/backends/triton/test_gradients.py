"""The gradient sweep at the sizes of real models, on tensors without data: everything but the CPU goes the GPU's way.

What would run there is followed op by op: which products it asks the library for, and what it holds meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from sgcd_kernels import linear_distill_loss, linear_logprob
from sgcd_kernels.core.lm_head import LMHead, Needs, Projection
from tests.sgcd_kernels.backends.cases import DEVICES
from tests.sgcd_kernels.backends.test_memory import LiveBytes

pytest.importorskip("triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32), (FP32, BF16)]  # of hidden and weight
PRODUCTS = {"addmm", "mm"}
SMALL = 1 << 20  # numbers of rows, what one token's row takes


class Products(LiveBytes):
    """Holds every product to what PyTorch's CUDA functions take (aten/src/ATen/native/cuda/Blas.cpp, 2.11 and 2.13)."""

    def __init__(self) -> None:
        super().__init__(())
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.rstrip("_") in PRODUCTS:
            self.count += 1
            self.check(func, *args, **(kwargs or {}))
            if "dtype_out" in func._overloadname:  # PyTorch 2.11 has no such function for tensors without data
                return kwargs["out"]
        return super().__torch_dispatch__(func, types, args, kwargs)

    def check(self, func: Any, *args: Any, beta: int = 1, out: Tensor | None = None, **others: Any) -> None:
        *total, a, b = [x for x in args if isinstance(x, Tensor)]
        assert not others and a.device.type == "meta" and a.dtype == b.dtype, func
        for matrix in (a, b):  # else the library is given a copy
            assert matrix.stride(1) == 1 or matrix.stride(0) == 1, (func, matrix.stride())
            assert max(matrix.stride()) % 16 == 0 or 1 in matrix.shape, (func, matrix.stride())
        if "dtype" not in func._overloadname:
            assert all(x.dtype == a.dtype for x in (*total, out) if x is not None), func
            return
        (to,) = [x for x in args if isinstance(x, torch.dtype)]
        assert to == FP32 and a.dtype in (FP16, BF16), func
        assert out is None or out.dtype == to, func
        assert all(x.dtype in (to, a.dtype) for x in total), func
        # cuBLASLt's path, taken for what could be a bias.
        assert not total or beta == 0 or 1 not in total[0].shape, func


@dataclass
class Written:
    """In the place of a kernel: notes what it is asked to fill."""

    starts: list[int] = field(default_factory=list)
    strides: set[int] = field(default_factory=set)

    def writer(self, x: Projection, tokens: slice) -> Any:
        self.starts.append(tokens.start)

        def write(first: int, out: Tensor) -> None:
            assert out.shape[0] == x.num_rows and out.stride(1) == 1
            self.strides.add(out.stride(0))

        return write


def projection(n: int, width: int, vocab: int, dtypes: tuple[torch.dtype, torch.dtype], masked: bool) -> Projection:
    """Masked: every other row of hidden counts, and n of them do."""
    hidden = torch.empty(2 * n if masked else n, width, dtype=dtypes[0], device="meta")
    rows = torch.arange(n, device="meta") * 2 if masked else None
    return Projection(hidden, LMHead(torch.empty(vocab, width, dtype=dtypes[1], device="meta")), rows)


SIZES = [(16_384, 2560, 248_320), (20_000, 8192, 128_256), (129, 576, 50_257), (129, 576, 251), (1, 576, 49_152)]


@pytest.mark.parametrize(
    ("dtypes", "n", "width", "vocab", "masked"),
    [
        *((dtypes, *size, True) for dtypes in DTYPES for size in SIZES),
        *(((BF16, BF16), *size, False) for size in SIZES),
        ((BF16, BF16), 11_469, 2560, 248_320, True),
        ((BF16, BF16), 16_384, 4096, 151_936, True),
    ],
)
def test_products_and_workspace(
    dtypes: tuple[torch.dtype, torch.dtype], n: int, width: int, vocab: int, masked: bool
) -> None:
    from sgcd_kernels.backends.triton.gradients import WORKSPACE_BYTES, plan, sweep_gradients
    from sgcd_kernels.backends.triton.launch import operand_dtype

    x, wrote = projection(n, width, vocab, dtypes, masked), Written()
    with Products() as seen:
        seen.known = {t.untyped_storage()._cdata for t in (x.hidden, x.head.weight, x.rows) if t is not None}
        grads = sweep_gradients(x, Needs(True, True, False), wrote.writer)
    results = sum(g.untyped_storage().nbytes() for g in grads[:2] if g is not None)
    held = seen.peak - results
    operand = operand_dtype(x)
    chunk = plan(n, width, vocab, operand.itemsize, dtypes[1] != operand)
    assert held <= chunk.bytes(width, operand.itemsize, dtypes[1] != operand) + SMALL
    assert held <= WORKSPACE_BYTES + SMALL, f"{held / 2**20:.0f} MB"
    assert held >= WORKSPACE_BYTES / 2 or n < 1000, "the counter sees nothing, or the budget is not used"
    assert seen.count >= 2 * len(wrote.starts)
    assert all(start % 128 == 0 for start in wrote.starts)  # a token's numbers begin on sixteen bytes in every chunk
    assert all(stride % 16 == 0 for stride in wrote.strides)


OPS = {
    "logprob": lambda x, w, y, t: linear_logprob(x, w, y, impl="triton").logp.sum().backward(),
    "distill": lambda x, w, y, t: linear_distill_loss(x, w, t, mask=y != -100, kind="jsd", impl="triton").backward(),
}


@pytest.mark.parametrize("op", OPS)
def test_whole_ops_keep_to_the_budget(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels themselves, in forward and backward, on small tensors with a budget that is small beside these."""
    from sgcd_kernels.backends.triton import gradients

    n, width, vocab, budget = 300, 128, 160, 160 << 10
    monkeypatch.setattr(gradients, "WORKSPACE_BYTES", budget)
    monkeypatch.setattr(gradients, "VOCAB_MULTIPLE", 32)
    g = torch.Generator().manual_seed(0)
    x, w, t = (torch.randn(rows, width, generator=g).to(DEVICES["triton"]) for rows in (n, vocab, n))
    y = torch.randint(vocab, (n,), generator=g)
    y[::3] = -100
    inputs = (x.requires_grad_(), w.requires_grad_(), y.to(x.device), t)
    with LiveBytes(inputs) as seen:
        OPS[op](*inputs)
    held = seen.peak - sum(leaf.grad.nbytes for leaf in (x, w) if leaf.grad is not None)
    per_token = 80 * 4  # statistics
    assert budget / 2 <= held <= budget + per_token * n
