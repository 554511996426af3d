"""sgcd_loss against the specification: every rule, every mask, every option, loss and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sgcd_kernels import CreditConfig, backend_status, reference, sgcd_loss
from sgcd_kernels.core.surrogate import LOSS_TYPES
from sgcd_kernels.credit.config import Rule

H, V = 6, 40
RULES = get_args(Rule)
CPP = backend_status()["cpp"]
# C++ computes in fp32 from the same numbers; thresholds of spans lie far enough from the signals for that.
IMPLS = {
    "torch": (torch.float64, {"rtol": 1e-10, "atol": 1e-13}),
    "cpp": (torch.float32, {"rtol": 2e-4, "atol": 2e-6}),
}


def skip_without(impl: str) -> None:
    if impl == "cpp" and not CPP.usable:
        pytest.skip(CPP.reason)


def batch(seed: int, lengths: Sequence[int], dtype: torch.dtype, *, teacher: str = "per token") -> dict[str, Any]:
    """Packed sequences; the mask has holes, turns are uneven, and the last sequence has no eligible token."""
    g, n = torch.Generator().manual_seed(seed), sum(lengths)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def some(*shape: int, share: float) -> Tensor:
        return torch.rand(*shape, generator=g) < share

    cu = torch.tensor([0, *lengths]).cumsum(0)
    credit_mask = some(n, share=0.8)
    credit_mask[n - lengths[-1] :] = False
    has_teacher = some(len(lengths), share=0.7) if teacher == "per sequence" else some(n, share=0.7)
    has_teacher[0] = True
    return {
        "hidden": rand(n, H).requires_grad_(),
        "weight": rand(V, H).requires_grad_(),
        "bias": rand(V).requires_grad_(),
        "targets": torch.randint(V, (n,), generator=g),
        "teacher_hidden": rand(n, H + 2),
        "teacher_weight": rand(V, H + 2),
        "teacher_bias": rand(V),
        "advantages": rand(len(lengths)) if seed % 2 else rand(n),
        "cu_seqlens": cu,
        "mask": some(n, share=0.8),
        "credit_mask": credit_mask,
        "has_teacher": has_teacher,
        "turn_ids": some(n, share=0.2).cumsum(0),
        "old_logp": -4 + rand(n) / 5,
        "ref_logp": -4 + rand(n) / 5,
        "importance_weights": rand(n).abs() + 0.5,
        "temperature": 0.5 + rand(n).abs(),
        "softcap": 5.0,
    }


def expected(inputs: dict[str, Any], config: CreditConfig, **policy: Any) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients of hidden, weight and bias), in fp64"""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    leaves = [wide[name].detach().requires_grad_() for name in ("hidden", "weight", "bias")]
    transform = wide["temperature"], wide["softcap"]
    p = reference.logits(*leaves, *transform)
    q = reference.logits(wide["teacher_hidden"], wide["teacher_weight"], wide["teacher_bias"], *transform)
    per_token = ("targets", "advantages")
    optional = ("has_teacher", "credit_mask", "turn_ids", "old_logp", "ref_logp", "importance_weights")
    loss = reference.sgcd_loss(
        p,
        q,
        *(wide[name] for name in per_token),
        wide["cu_seqlens"].tolist(),
        wide["mask"],
        config=config,
        **{name: wide.get(name) for name in optional},
        **policy,
    )
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def assert_equals_reference(impl: str, inputs: dict[str, Any], config: CreditConfig, **options: Any) -> None:
    policy = {"loss_type": "grpo", "beta": 0.1, "epsilon": 0.15, "epsilon_high": 0.28} | options
    reuse_lse = policy.pop("reuse_lse", True)
    loss, metrics = sgcd_loss(**inputs, config=config, impl=impl, reuse_lse=reuse_lse, **policy)
    want, gradients = expected(inputs, config, **policy)
    tolerance = IMPLS[impl][1]
    torch.testing.assert_close(loss.double(), want, **tolerance)
    found = torch.autograd.grad(loss, [inputs[name] for name in ("hidden", "weight", "bias")])
    for ours, exact in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance["rtol"], atol=10 * tolerance["atol"])
    assert all(not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("seed", "lengths", "teacher"), [(1, (11, 0, 1, 18, 6), "per token"), (2, (9, 20, 7), "per sequence")]
)
def test_every_rule(impl: str, rule: str, seed: int, lengths: tuple[int, ...], teacher: str) -> None:
    skip_without(impl)
    inputs = batch(seed, lengths, IMPLS[impl][0], teacher=teacher)
    config = CreditConfig(rule=rule, gamma=0.7, clip=1.6, patience=3, seed=5)
    assert_equals_reference(impl, inputs, config)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("reuse_lse", [True, False])
def test_every_loss_type(impl: str, loss_type: str, reuse_lse: bool) -> None:
    skip_without(impl)
    inputs = batch(3, (12, 5, 8), IMPLS[impl][0])
    assert_equals_reference(impl, inputs, CreditConfig(), loss_type=loss_type, reuse_lse=reuse_lse)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "absent", ["has_teacher", "credit_mask", "turn_ids", "old_logp", "importance_weights", "teacher_bias"]
)
def test_without_an_optional_input(impl: str, absent: str) -> None:
    skip_without(impl)
    inputs = batch(4, (10, 14), IMPLS[impl][0])
    inputs[absent] = torch.zeros(V, dtype=IMPLS[impl][0]) if absent == "teacher_bias" else None
    assert_equals_reference(impl, inputs, CreditConfig(span_value="own"), num_items_in_batch=7)


def test_the_batches_carry_credit() -> None:
    """Else all of the above would compare plain policy losses."""
    for seed, lengths in ((1, (11, 0, 1, 18, 6)), (2, (9, 20, 7)), (3, (12, 5, 8)), (4, (10, 14))):
        _, metrics = sgcd_loss(**batch(seed, lengths, torch.float64))
        assert metrics["credit/mean_weight"] > 1.05 and metrics["credit/num_spans"] > 1
