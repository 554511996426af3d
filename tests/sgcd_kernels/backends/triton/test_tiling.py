"""Tiling plans of the Triton backend: vocab splits, vocab and token chunks, the order of programs, and their memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sgcd_kernels import linear_distill_loss, linear_divergence, linear_logprob
from tests.sgcd_kernels.backends.cases import DEVICES, case, exact, grads, leaves_of, on, weights

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("splits", [1, 2, 5, 64])
def test_any_number_of_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgcd_kernels.backends.triton import launch

    c = case(20, 8, 300, torch.float32)
    monkeypatch.setattr(launch, "slots_of", lambda device, config: 2 * splits)
    x, w, y, t = on(c, "triton")
    got, want = linear_divergence(x, w, y, t, features=("jsd", "tv"), beta=0.3, impl="triton"), exact(c)
    for name, value in want.items():
        mine = getattr(got, name).cpu().double()
        torch.testing.assert_close(mine, value, rtol=1e-5, atol=4e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_change_the_result(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgcd_kernels.backends.triton import gradients

    c = case(50, 24, 300, dtype)

    def run() -> tuple[torch.Tensor, ...]:
        def loss(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            stats = linear_logprob(x, w, c.y.to(x.device), bias=b, impl="triton")
            return (stats.logp * weights(50, x.device)).sum()

        return grads(loss, leaves_of(c, dtype, DEVICES["triton"]))

    whole = run()
    monkeypatch.setattr(gradients, "VOCAB_MULTIPLE", 32)
    monkeypatch.setattr(gradients, "TOKEN_MULTIPLE", 16)
    monkeypatch.setattr(gradients, "WORKSPACE_BYTES", 9_000)
    chunk = gradients.plan(50, 24, 300, dtype.itemsize)
    assert chunk.tokens < 50 and chunk.vocab < 300
    for a, e in zip(run(), whole):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


@pytest.mark.parametrize("width", [576, 1024, 2560, 4096, 8192])
@pytest.mark.parametrize("vocab", [49_152, 151_936, 248_320])
@pytest.mark.parametrize("n", [1, 1024, 16_384, 65_536])
@pytest.mark.parametrize("weight_cast", [False, True])
def test_workspace_keeps_to_its_budget(n: int, vocab: int, width: int, weight_cast: bool) -> None:
    from sgcd_kernels.backends.triton import gradients
    from sgcd_kernels.backends.triton.launch import config_for, split_vocab

    chunk = gradients.plan(n, width, vocab, 2, weight_cast)
    assert chunk.bytes(width, 2, weight_cast) <= gradients.WORKSPACE_BYTES
    assert chunk.vocab >= 1024 and (chunk.vocab % 256 == 0 or chunk.vocab == vocab)
    config = config_for("pair_stats", 9, 2)
    sizes = split_vocab(n, vocab, config, 132 * config.programs_per_sm, 18)
    partials = sizes.num_splits * 11 * n * 4
    assert partials * 3 <= gradients.WORKSPACE_BYTES  # and what merging makes of them


@pytest.mark.parametrize("vocab", [49_152, 151_936, 248_320])
@pytest.mark.parametrize("top_k", [1, 20, 100, 1000])
@pytest.mark.parametrize("block_v", [16, 64, 128])
def test_top_k_keeps_to_its_budget(top_k: int, vocab: int, block_v: int) -> None:
    from sgcd_kernels.backends.triton import topk

    tokens = topk.chunk_size(top_k, vocab, block_v)
    tiles = -(-vocab // block_v)
    chosen = tokens * (min(top_k, tiles) + 1) * block_v
    kept = 5 * 4 * tokens * tiles + 2 * 4 * chosen + 8 * chosen  # peaks, logits, vocab ids
    assert tokens % 16 == 0 or tokens < 16  # what is per token begins on sixteen bytes in every chunk
    assert tokens >= 1 and kept <= topk.CHUNK_BYTES / 2  # as much again for what is made of them


WAYS = {
    "stacked": {"stacked": True},
    "flatten": {"flatten": True},
    "guarded": {"guarded": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_a_configuration(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that no test takes by itself: both heads as one product, flattened loops, guards in every tile."""
    from sgcd_kernels.backends.triton import launch
    from sgcd_kernels.backends.triton.configs import INTERPRETER, Config

    asked = []
    tile = INTERPRETER if DEVICES["triton"] == "cpu" else Config(64, 32, 64, 8, 2)  # twice its rows fit, if stacked
    config = replace(tile, **WAYS[way])
    monkeypatch.setattr(launch, "config_for", lambda *call: asked.append(call[0]) or config)
    c = case(37, 21, 150, torch.float32)
    y = c.y.clone()
    y[::3] = -100
    keep = y != -100
    x, w, y, t = (a.to(DEVICES["triton"]) for a in (c.x, c.w, y, c.t))
    bias = torch.zeros(150, device=x.device)
    bias[[3, 149]] = -torch.inf
    for extras in ({}, {"bias": bias, "temperature": 0.8}):
        got = linear_divergence(x, w, y, t, features=("jsd", "tv"), beta=0.3, top_k=4, impl="triton", **extras)
        want = exact(c, **{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in extras.items()})
        for name, value in want.items():
            mine = getattr(got, name).cpu().double()[keep]
            torch.testing.assert_close(mine, value[keep], rtol=1e-5, atol=4e-6, msg=lambda m, n=name: n + m)
        stats = linear_logprob(x, w, y, impl="triton", **extras)
        torch.testing.assert_close(stats.entropy, got.student_entropy, rtol=1e-5, atol=1e-5)
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        results = []
        for impl in ("triton", "torch"):
            leaves = [a.clone().requires_grad_() for a in (x, w)]
            loss = linear_distill_loss(*leaves, t, mask=y != -100, kind=kind, impl=impl)
            results.append(torch.autograd.grad(loss, leaves))
        for mine, theirs in zip(*results):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    assert set(asked) >= {"head_stats", "pair_stats", "mixture_stats", "distill_grad"}  # it was in force


@pytest.mark.parametrize("resident", [1, 4, 1000])
def test_any_order_of_programs(resident: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many token tiles run together, each tile is made once: forward and backward."""
    from sgcd_kernels.backends.triton import launch

    c = case(85, 8, 200, torch.float32)
    monkeypatch.setattr(launch, "token_tile_group", lambda config, *heads: resident)
    monkeypatch.setattr(launch, "slots_of", lambda device, config: 7)
    x, w, y, t = on(c, "triton")
    got, want = linear_divergence(x, w, y, t, impl="triton"), exact(c)
    torch.testing.assert_close(got.reverse_kl.cpu().double(), want["reverse_kl"], rtol=1e-5, atol=4e-6)
    leaves = [a.clone().requires_grad_() for a in (x, w)]
    grads = torch.autograd.grad(linear_logprob(*leaves, y, impl="triton").logp.sum(), leaves)
    theirs = torch.autograd.grad(linear_logprob(*leaves, y, impl="torch").logp.sum(), leaves)
    for mine, other in zip(grads, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_every_target_is_found() -> None:
    """Targets at the edges of vocab tiles, forward and backward; no other target lies in these tiles of tokens."""
    c = case(96, 3, 130, torch.float32)
    x, w, y, t = on(c._replace(y=torch.tensor([0, 63, 64, 127, 128, 129]).repeat_interleave(16)), "triton")
    got, want = (linear_divergence(x, w, y, t, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(got.student_logp, want.student_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.teacher_logp, want.teacher_logp, rtol=1e-5, atol=1e-5)
    leaves = [a.clone().requires_grad_() for a in (x, w)]
    mine, theirs = (
        torch.autograd.grad(linear_logprob(*leaves, y, impl=impl).logp.sum(), leaves) for impl in ("triton", "torch")
    )
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
