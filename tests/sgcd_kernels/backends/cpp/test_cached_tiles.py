"""Tiles that the forward sweep of a loss caches: a gradient made of them is the one made of recomputed logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sgcd_kernels import backend_status, linear_policy_loss
from sgcd_kernels.core.statistics import HeadStats
from tests.sgcd_kernels.backends.cases import Case, case, weights

STATUS = backend_status()["cpp"]
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason)]

SHAPES = {
    "all in the rows of dW": (60, 96, 300),
    "and beyond them": (500, 70, 333),
    "one token": (1, 8, 65),
    "whole blocks": (130, 64, 256),
    "odd H": (100, 33, 130),
    "some do not fit": (640, 16, 30_000),
    "more than are packed at one time": (13_000, 512, 150),
}


def gradients(
    c: Case,
    needs: list[bool],
    *,
    cache: bool,
    bias: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(those of sum weights logp that were asked for, what was cached: copies, because the gradient uses it up)"""
    ops: Any = torch.ops.sgcd_kernels
    arguments = (c.x, c.w, bias, None, c.y, temperature, 0.0)
    stats, cached = ops.head_stats_cached(*arguments, needs[1]) if cache else (ops.head_stats(*arguments), [])
    d = weights(c.x.shape[0])
    lse, low = HeadStats(*stats).results()[2:]
    copies = [x.clone() for x in cached]
    grads = ops.logprob_grads(*arguments, lse, low, -d, d, None, None, needs, False, cached)
    return [g for g, need in zip(grads, needs, strict=True) if need], copies


def exact(c: Case, bias: torch.Tensor | None, temperature: torch.Tensor | None) -> list[torch.Tensor]:
    leaves = [x.double().requires_grad_() for x in (c.x, c.w, torch.zeros(len(c.w)) if bias is None else bias)]
    logits = leaves[0] @ leaves[1].T + leaves[2]
    logits = logits if temperature is None else logits / temperature.double()[:, None]
    logp = logits.log_softmax(1).gather(1, c.y[:, None])[:, 0]
    return list(torch.autograd.grad((logp * weights(len(c.x)).double()).sum(), leaves))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]])
def test_fp32_sums_the_same_numbers(shape: str, needs: list[bool]) -> None:
    """The weight's gradient to the bit; hidden's is summed over the vocabulary in another order."""
    c = case(*SHAPES[shape], torch.float32)
    again, _ = gradients(c, needs, cache=False)
    got, cached = gradients(c, needs, cache=True)
    tokens = cached[2].shape[1] if needs[1] else cached[1].shape[2]
    assert tokens >= len(c.x) or shape == "some do not fit"
    for one, other in zip(got, again, strict=True):
        assert torch.equal(one, other) or (len(one) == len(c.x) and float((one - other).norm() / other.norm()) < 3e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_as_near_to_the_truth(shape: str) -> None:
    c = case(*SHAPES[shape], torch.bfloat16)
    bias, temperature = torch.linspace(-1, 1, len(c.w)), torch.linspace(0.5, 2, len(c.x))
    for extras in ({}, {"bias": bias, "temperature": temperature}):
        truth = exact(c, extras.get("bias"), extras.get("temperature"))
        again, _ = gradients(c, [True, True, True], cache=False, **extras)
        got, _ = gradients(c, [True, True, True], cache=True, **extras)
        errors = [
            [float((g.double() - true).norm() / true.norm()) for g, true in zip(grads, truth, strict=True)]
            for grads in (got, again)
        ]
        (hidden, weight, of_bias), (known_hidden, known_weight, _) = errors
        assert hidden < 1.6 * known_hidden and weight < 1.6 * known_weight
        assert of_bias < 1e-3  # a sum of numbers rounded to 2^-9, which `again` sums in fp32


def test_a_nearly_certain_token_keeps_its_gradient() -> None:
    """p - 1 of a p that was rounded to bf16 would be off by a part in 500 of the advantage, not of itself."""
    h, v = 64, 300
    w = torch.randn(v, h, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40)
    c = Case((w[y] / h * 12.0).bfloat16(), w.bfloat16(), y, w[y])
    assert (c.x.double() @ c.w.double().T).softmax(1)[y, y].median() > 0.95
    truth = exact(c, None, None)
    got, _ = gradients(c, [True, True, False], cache=True)
    for one, true in zip(got, truth, strict=False):
        assert ((one.double() - true).norm() / true.norm()) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_policy_loss_caches_and_its_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    c, threads, results = case(300, 48, 1000, dtype), torch.get_num_threads(), []
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        x, w = c.x.clone().requires_grad_(), c.w.clone().requires_grad_()
        loss, metrics = linear_policy_loss(x, w, c.y, weights(300), loss_type="dapo", impl="cpp")
        loss.backward()
        results.append((loss.detach(), metrics["entropy"], x.grad, w.grad))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_what_was_cached_for_something_else_is_refused() -> None:
    c, ops = case(70, 16, 100, torch.float32), torch.ops.sgcd_kernels
    arguments = (c.x, c.w, None, None, c.y, None, 0.0)
    _, cached = ops.head_stats_cached(*arguments, True)
    each = torch.zeros(70)
    for wrong in (
        (*arguments, each, None, each, each, None, None, [True, False, False], False, cached),
        (*arguments, each, None, each, each, each, each, [True, True, False], False, cached),
        (*arguments, each, None, each, each, None, None, [True, True, False], False, cached[:4]),
        (
            c.x[:64],
            c.w,
            None,
            None,
            c.y[:64],
            None,
            0.0,
            *[each[:64]] * 4,
            None,
            None,
            [True, True, False],
            False,
            cached,
        ),
    ):
        with pytest.raises(ValueError, match="cached"):
            ops.logprob_grads(*wrong)
