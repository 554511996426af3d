"""The aliases of cut-cross-entropy's and verl's functions, against what they define."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sgcd_kernels.integrations import cut_cross_entropy, verl


@pytest.mark.parametrize(("reduction", "shift"), [("mean", False), ("none", True)])
def test_cut_cross_entropy(reduction: str, shift: bool) -> None:
    """Against the original's PyTorch path, which runs on a CPU."""
    original = pytest.importorskip("cut_cross_entropy", reason="cut-cross-entropy is not installed")
    torch.manual_seed(0)
    e, c, targets = torch.randn(2, 6, 8), torch.randn(40, 8), torch.randint(40, (2, 6))
    targets[0, 2] = -100
    results = []
    for function, options in (
        (cut_cross_entropy.linear_cross_entropy, {}),
        (original.linear_cross_entropy, {"impl": "torch_compile"}),
    ):
        leaves = [e.clone().requires_grad_(), c.clone().requires_grad_()]
        loss = function(*leaves, targets, softcap=5.0, reduction=reduction, shift=shift, **options)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_cut_cross_entropy_shifts_by_more_than_one_and_takes_a_bias() -> None:
    torch.manual_seed(0)
    e, c, targets, bias = torch.randn(2, 6, 8), torch.randn(40, 8), torch.randint(40, (2, 6)), torch.randn(40)
    loss = cut_cross_entropy.linear_cross_entropy(e, c, targets, bias=bias, shift=2)
    want = F.cross_entropy((e @ c.T + bias)[:, :-2].reshape(-1, 40), targets[:, 2:].reshape(-1))
    torch.testing.assert_close(loss, want)
    summed = cut_cross_entropy.linear_cross_entropy(e, c, targets, bias=bias, shift=2, reduction="sum")
    torch.testing.assert_close(summed, want * 8)
    with pytest.raises(ValueError, match="shift is 6"):
        cut_cross_entropy.linear_cross_entropy(e, c, targets, shift=6)
    with pytest.raises(ValueError, match="reduction"):
        cut_cross_entropy.linear_cross_entropy(e, c, targets, reduction="avg")


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_verl(reduction: str, shape: tuple[int, ...]) -> None:
    """verl's kernel needs a GPU; its definition is log-softmax(hidden weight^T / temperature), of [B, T] flattened."""
    torch.manual_seed(0)
    x, w, y = torch.randn(6, 8), torch.randn(40, 8), torch.randint(40, (6,))
    logp, entropy = verl.linear_cross_entropy(x.view(*shape, 8), w, y.view(shape), 0.7, reduction)
    table = ((x @ w.T) / 0.7).log_softmax(-1)
    chosen = table.gather(1, y[:, None])[:, 0]
    want = {"none": chosen, "sum": chosen.sum(), "mean": chosen.mean()}[reduction]
    torch.testing.assert_close(logp, want)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1))
