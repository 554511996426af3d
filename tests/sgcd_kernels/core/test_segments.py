"""Sequences of packed tokens: their means, and how their sums are taken."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgcd_kernels.core.segments import Segments, runs_of


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_sequence_sums_use_no_atomics() -> None:
    """index_add and its like sum in any order on CUDA: the loss would change from run to run."""
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    segments = Segments(torch.tensor([1, 1, 1, 3, 3, 3, 3]), 5, 4)
    with Called() as called:
        mean = segments.mean(x)
    assert not {name for name in called.names if "index_add" in name or "scatter" in name or "index_put" in name}
    want = torch.stack([x[:0].sum(), x[:3].mean(), x[:0].sum(), x[3:].mean(), x[:0].sum()])
    torch.testing.assert_close(mean, want)
    upstream = torch.randn(5, dtype=torch.float64)
    ours, plain = (torch.autograd.grad(y, x, upstream)[0] for y in (mean, want))
    torch.testing.assert_close(ours, plain)
    assert torch.equal(Segments(torch.zeros(0).long(), 3, 0).mean(torch.zeros(0)), torch.zeros(3))


def test_sequences_of_a_batch_and_of_packed_tokens() -> None:
    device = torch.device("cpu")
    batch = Segments.of(torch.Size([2, 3]), None, device)
    assert (batch.ids.tolist(), batch.count, batch.longest) == ([0, 0, 0, 1, 1, 1], 2, 3)
    packed = Segments.of(torch.Size([5]), torch.tensor([0, 2, 2, 5]), device)
    assert (packed.ids.tolist(), packed.count, packed.longest) == ([0, 0, 2, 2, 2], 3, 3)
    alone = Segments.of(torch.Size([4]), None, device)
    assert (alone.ids.tolist(), alone.count, alone.longest) == ([0] * 4, 1, 4)
    some = packed.gather(torch.tensor([1, 4]))
    assert (some.ids.tolist(), some.count, some.longest) == ([0, 2], 3, 3)
    assert packed.gather(None) is packed


@pytest.mark.parametrize("values", [[7.0, 8.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
def test_values_of_sequences_are_spread_and_those_of_tokens_kept(values: list[float]) -> None:
    packed = Segments.of(torch.Size([5]), torch.tensor([0, 2, 2, 5]), torch.device("cpu"))
    got = packed.per_token(torch.tensor(values), torch.Size([5])).tolist()
    assert got == ([7.0, 7.0, 9.0, 9.0, 9.0] if len(values) == 3 else values)


def test_runs_number_consecutive_loss_tokens() -> None:
    mask = torch.tensor([False, True, True, False, False, True, False, True])
    assert runs_of(mask)[mask].tolist() == [1, 1, 2, 3]
