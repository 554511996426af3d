"""How the Triton backend cuts its work: shares of the vocabulary, slices, groups of tokens, and their memory."""

from __future__ import annotations

import pytest
import torch

from sgcd_kernels import linear_divergence, linear_logprob
from tests.kernels.cases import DEVICES, case, exact, grads, leaves_of, on, weights

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("shares", [1, 2, 5, 64])
def test_any_number_of_shares(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgcd_kernels.triton import launch

    c = case(20, 8, 300, torch.float32)
    monkeypatch.setattr(launch, "slots_of", lambda device, config: 2 * shares)
    x, w, y, t = on(c, "triton")
    got, want = linear_divergence(x, w, y, t, features=("jsd", "tv"), beta=0.3, impl="triton"), exact(c)
    for name, value in want.items():
        mine = getattr(got, name).cpu().double()
        torch.testing.assert_close(mine, value, rtol=1e-5, atol=4e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_and_groups_do_not_change_the_result(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgcd_kernels.triton import grads as walk

    c = case(50, 24, 300, dtype)

    def run() -> tuple[torch.Tensor, ...]:
        def loss(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            stats = linear_logprob(x, w, c.y.to(x.device), bias=b, impl="triton")
            return (stats.logp * weights(50, x.device)).sum()

        return grads(loss, leaves_of(c, dtype, DEVICES["triton"]))

    whole = run()
    monkeypatch.setattr(walk, "SLICE_MULTIPLE", 32)
    monkeypatch.setattr(walk, "WORKSPACE_BYTES", 9_000)
    cut = walk.cut_of(50, 24, 300, dtype.itemsize)
    assert cut.tokens < 50 and cut.words < 300
    for a, e in zip(run(), whole):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


@pytest.mark.parametrize("width", [576, 1024, 2560, 4096, 8192])
@pytest.mark.parametrize("vocab", [49_152, 151_936, 248_320])
@pytest.mark.parametrize("n", [1, 1024, 16_384, 65_536])
@pytest.mark.parametrize("weight_cast", [False, True])
def test_workspace_keeps_to_its_budget(n: int, vocab: int, width: int, weight_cast: bool) -> None:
    from sgcd_kernels.triton import grads as walk
    from sgcd_kernels.triton.configs import config_for
    from sgcd_kernels.triton.launch import shares_of

    cut = walk.cut_of(n, width, vocab, 2, weight_cast)
    assert cut.bytes(width, 2, weight_cast) <= walk.WORKSPACE_BYTES
    assert cut.words >= 1024 and (cut.words % 256 == 0 or cut.words == vocab)
    config = config_for("pair_stats", 9, 2)
    shares = shares_of(n, vocab, config, 132 * config.programs)
    partials = shares.count * 11 * n * 4
    assert partials * 3 <= walk.WORKSPACE_BYTES  # and what merging makes of them
