"""The aliases of cut-cross-entropy's and verl's functions, against what they define."""

from __future__ import annotations

import enum
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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


# linear_cross_entropy of cut-cross-entropy 25.9 (its module in the second row); the release on PyPI, 25.1, has fewer.
ORDER = (
    "e c targets bias ignore_index softcap reduction shift return_lse filter_eps accum_e_fp32 accum_c_fp32 "
    "filter_e_grad filter_c_grad impl vocab_parallel_options"
).split()
MODULE = (
    "ignore_index softcap reduction shift filter_eps accum_e_fp32 accum_c_fp32 filter_e_grad filter_c_grad impl "
    "return_lse"
).split()
OWN_DEFAULTS = ("filter_eps", "impl")  # 25.1 has "high" and its own kernel; neither changes a result here


def test_its_arguments_have_the_places_of_the_original() -> None:
    ours = inspect.signature(cut_cross_entropy.linear_cross_entropy).parameters
    assert list(ours) == ORDER
    assert list(inspect.signature(cut_cross_entropy.LinearCrossEntropy).parameters) == MODULE
    assert list(inspect.signature(cut_cross_entropy.LinearCrossEntropy.forward).parameters)[1:] == ORDER[:4]
    original = pytest.importorskip("cut_cross_entropy", reason="cut-cross-entropy is not installed")
    for function in ("linear_cross_entropy", "LinearCrossEntropy"):
        known = inspect.signature(getattr(cut_cross_entropy, function)).parameters
        for name, theirs in inspect.signature(getattr(original, function)).parameters.items():
            assert name in OWN_DEFAULTS or known[name].default == theirs.default, (function, name)
            assert known[name].kind == theirs.kind


def setting(shape: tuple[int, ...] = (2, 6)) -> tuple[torch.Tensor, ...]:
    """(e, c, targets with one ignored, bias)"""
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(40, shape, generator=g)
    targets.view(-1)[2] = -100
    return torch.randn(*shape, 8, generator=g), torch.randn(40, 8, generator=g), targets, torch.randn(40, generator=g)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 2, 6)])
@pytest.mark.parametrize("shift", [0, False, True, 1, 2, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_argument_by_position(reduction: str, shift: bool | int, shape: tuple[int, ...]) -> None:
    """Against logits: bias fourth, any leading shape, shifts, and the log-sum-exps with their gradient."""
    e, c, targets, bias = setting(shape)
    leaves = [x.clone().requires_grad_() for x in (e, c, bias)]
    loss, lse = cut_cross_entropy.linear_cross_entropy(
        leaves[0], leaves[1], targets, leaves[2], -100, 5.0, reduction, shift, return_lse=True
    )
    theirs = [x.clone().requires_grad_() for x in (e, c, bias)]
    n = int(shift)
    z = 5 * ((theirs[0] @ theirs[1].T + theirs[2]) / 5).tanh()[..., : shape[-1] - n, :]
    y = targets[..., n:]
    want = F.cross_entropy(z.reshape(-1, 40), y.reshape(-1), reduction=reduction)
    want_lse = z.logsumexp(-1) * (y != -100)
    torch.testing.assert_close(loss, want.view(y.shape) if reduction == "none" else want)
    torch.testing.assert_close(lse, want_lse)
    grads = (torch.autograd.grad(a.sum() + 0.3 * b.square().sum(), x) for a, b, x in
             ((loss, lse, leaves), (want, want_lse, theirs)))  # fmt: skip
    torch.testing.assert_close(*grads)
    options = {"softcap": 5.0, "reduction": reduction, "shift": shift}
    module = cut_cross_entropy.LinearCrossEntropy(**options)
    assert torch.equal(module(e, c, targets, bias), loss)
    both = cut_cross_entropy.LinearCrossEntropy(**options, return_lse=True)(e, c, targets, bias)
    assert torch.equal(both[0], loss) and torch.equal(both[1], lse)


class Theirs(enum.IntEnum):
    """Like the original's LinearCrossEntropyImpl."""

    CCE = 1
    TORCH_COMPILE = 2
    CCE_EXACT = 3


@pytest.mark.parametrize(
    "options",
    [{"impl": name} for name in ("auto", "torch", *cut_cross_entropy.THEIR_IMPLS, *Theirs)]
    + [{"filter_eps": x} for x in (None, "auto", "high", 1e-3, float("-inf"))]
    + [{name: value} for name in ORDER[10:14] for value in (True, False)],
    ids=str,
)
def test_what_only_chooses_among_its_kernels_is_accepted(options: dict[str, Any]) -> None:
    e, c, targets, bias = setting()
    want = cut_cross_entropy.linear_cross_entropy(e, c, targets, bias)
    torch.testing.assert_close(cut_cross_entropy.linear_cross_entropy(e, c, targets, bias, **options), want)
    torch.testing.assert_close(cut_cross_entropy.LinearCrossEntropy(**options)(e, c, targets, bias), want)


def test_no_tokens_give_the_mean_of_pytorch() -> None:
    e, c, targets, bias = setting()
    assert cut_cross_entropy.linear_cross_entropy(e, c, torch.full_like(targets, -100), bias).isnan()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bias": -100}, "bias is -100, needs a tensor or None; the fourth argument has been bias since .* by name"),
        ({"reduction": "avg"}, "reduction is 'avg', needs one of mean, sum, none"),
        ({"shift": 6}, r"shift is 6, needs an integer in \[0, 5\]"),
        ({"shift": -1}, r"shift is -1"),
        ({"shift": 1.5}, r"shift is 1.5"),
        ({"filter_eps": "hihg"}, "filter_eps is 'hihg', needs one of auto, high; did you mean 'high'"),
        ({"impl": "cce_exakt"}, "impl is 'cce_exakt', .* did you mean 'cce_exact'"),
        ({"targets": torch.zeros(12, dtype=torch.long)}, r"targets has shape \[12\], needs \[2, 6\] to fit e"),
        (
            {"vocab_parallel_options": cut_cross_entropy.VocabParallelOptions(0, 40, reduce_e_grad=False)},
            "reduce_e_grad is False, needs True",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    e, c, targets, bias = setting()
    with pytest.raises(ValueError, match=message):
        cut_cross_entropy.linear_cross_entropy(**{"e": e, "c": c, "targets": targets, "bias": bias, **arguments})


def shard(rank: int, folder: str) -> None:
    """One rank of two: loss, log-sum-exps and gradients of an uneven split, as `from_vocab` cuts it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    e, c, targets, bias = setting()
    c, bias = c[:39], bias[:39]
    options = cut_cross_entropy.VocabParallelOptions.from_vocab(39)
    mine = slice(options.start, options.stop)
    leaves = [x.clone().requires_grad_() for x in (e, c[mine], bias[mine])]
    loss, lse = cut_cross_entropy.linear_cross_entropy(
        leaves[0], leaves[1], targets.clamp(max=38), leaves[2], vocab_parallel_options=options, return_lse=True
    )
    torch.save((loss.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)), f"{folder}/{rank}.pt")
    wrong = cut_cross_entropy.VocabParallelOptions(options.start + 1, options.stop + 1)
    with pytest.raises(ValueError, match=r"vocab_parallel_options are rows .* in the order of the ranks"):
        cut_cross_entropy.linear_cross_entropy(e, c[mine], targets, vocab_parallel_options=wrong)
    dist.destroy_process_group()


def test_vocab_parallel_options(tmp_path: Path) -> None:
    mp.spawn(shard, args=(str(tmp_path),), nprocs=2)
    e, c, targets, bias = setting()
    leaves = [x.clone().requires_grad_() for x in (e, c[:39], bias[:39])]
    loss, lse = cut_cross_entropy.linear_cross_entropy(
        leaves[0], leaves[1], targets.clamp(max=38), leaves[2], return_lse=True
    )
    grads = torch.autograd.grad(loss, leaves)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first[3].shape == (20, 8) and second[3].shape == (19, 8)
    for whole in (first, second):
        torch.testing.assert_close(whole[:3], (loss.detach(), lse.detach(), grads[0]))
    torch.testing.assert_close([torch.cat(pair) for pair in zip(first[3:], second[3:])], list(grads[1:]))


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
