"""Every credit rule against the specification, on random packed batches with holes, turns and empty sequences."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgcd_kernels import CreditConfig, backend_status, credit_weights, reference
from sgcd_kernels.credit.config import Rule
from sgcd_kernels.credit.rules import RULES
from tests.properties import examples

NAMES = get_args(Rule)
IMPLS = [name for name in ("torch", "cpp") if backend_status()[name].usable]


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, Any], torch.Tensor]:
    """(signals in fp64, cu_seqlens)"""
    lengths = draw(st.lists(st.integers(0, 25), min_size=1, max_size=5))
    n, g = sum(lengths), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def uniform() -> torch.Tensor:
        return torch.rand(n, generator=g, dtype=torch.float64)

    advantages = torch.randn(len(lengths) if draw(st.booleans()) else n, generator=g, dtype=torch.float64)
    signals = {
        "divergence": draw(st.sampled_from([0.0, 1e-3, 1.0, 50.0])) * uniform() ** draw(st.integers(1, 9)),
        "teacher_entropy": draw(st.sampled_from([0.0, 0.05, 3.0])) * uniform(),
        "mask": uniform() < draw(st.sampled_from([0.0, 0.6, 1.0])),
        "turn_ids": torch.randint(-1, 3, (n,), generator=g) if draw(st.booleans()) else (uniform() < 0.15).cumsum(0),
        "advantages": advantages * draw(st.sampled_from([0.0, 1.0])),
        "log_ratio": draw(st.sampled_from([0.0, 0.1, 30.0])) * (uniform() - 0.5),
        "forward_kl": draw(st.sampled_from([0.0, 1e-5, 2.0])) * uniform() ** 4,
        "bhattacharyya": uniform(),
        "student_entropy": draw(st.sampled_from([0.0, 2.0])) * uniform(),
    }
    return signals, torch.tensor([0, *lengths]).cumsum(0)


@st.composite
def configs(draw: st.DrawFn) -> CreditConfig:
    return CreditConfig(
        rule=draw(st.sampled_from(NAMES)),
        gamma=draw(st.sampled_from([0.0, 0.5, 1.0, 4.0])),
        clip=draw(st.sampled_from([1.0, 1.5, 2.0])),
        quantile=draw(st.sampled_from([0.5, 0.99, 1.0])),
        patience=draw(st.integers(1, 5)),
        reset=draw(st.sampled_from([0.0, 0.02, 0.1])),
        span_value=draw(st.sampled_from(["onset", "own"])),
        seed=draw(st.integers(-(2**63), 2**63)),
        rlsd_lambda=draw(st.sampled_from([0.0, 0.3])),
        dgpo_kappa=draw(st.sampled_from([0.0, 1.0, 2.0])),
        turn_epsilon=draw(st.sampled_from([0.2, 1.0])),
    )


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(), configs())
@settings(max_examples=examples(300))
def test_every_rule_equals_the_reference(
    impl: str, batch: tuple[dict[str, Any], torch.Tensor], cfg: CreditConfig
) -> None:
    signals, cu = batch
    got = credit_weights(cu_seqlens=cu, config=cfg, impl=impl, **signals)
    spread = signals | {"advantages": reference.per_token(signals["advantages"], cu.tolist())}
    weights, saliency, spans = reference.credit_weights(cu_seqlens=cu.tolist(), config=cfg, **spread)
    torch.testing.assert_close(got.weights, weights, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.saliency, saliency, rtol=1e-10, atol=1e-12)
    assert got.span_ids.tolist() == spans.tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", NAMES)
def test_every_rule_once_at_its_defaults(impl: str, rule: str) -> None:
    g = torch.Generator().manual_seed(3)
    n, cu = 120, torch.tensor([0, 50, 50, 51, 120])
    names = ("divergence", "teacher_entropy", "log_ratio", "forward_kl", "bhattacharyya", "student_entropy")
    signals: dict[str, Any] = {name: torch.rand(n, generator=g, dtype=torch.float64) ** 3 for name in names}
    signals |= {"mask": torch.rand(n, generator=g) < 0.8, "turn_ids": torch.arange(n) // 9}
    signals["advantages"] = torch.randn(n, generator=g, dtype=torch.float64)
    config = CreditConfig(rule=rule)
    got = credit_weights(cu_seqlens=cu, config=config, impl=impl, **signals)
    want = reference.credit_weights(cu_seqlens=cu.tolist(), config=config, **signals)
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)
    assert rule == "none" or (got.weights != 1).any()


def test_the_reference_and_the_library_know_the_same_rules() -> None:
    assert set(reference.RULES) == set(RULES) == set(NAMES)


def test_the_permutation_is_of_its_sequence_and_of_its_seed() -> None:
    for count, sequence, seed in ((1, 0, 0), (7, 3, 1), (40, 0, -9)):
        order = reference.shuffled(count, sequence, seed)
        assert sorted(order) == list(range(count))
        assert order == reference.shuffled(count, sequence, seed)
    assert reference.shuffled(40, 0, 1) != reference.shuffled(40, 1, 1) != reference.shuffled(40, 1, 2)
