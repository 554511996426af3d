"""Where the credit falls: checked against counting by hand, and against bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.records.made_rollouts import rollout
from trainer.data import Rollout, Scored, TokenClass
from trainer.records import credit_metrics


def scored(
    r: Rollout, weights: list[float], divergence: list[float] | None = None, span: list[int] | None = None
) -> Scored:
    """The given values at the generated tokens, and poison at the observed ones: they must never be read."""
    rest = len(r.ids) - len(weights)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values + [float("nan")] * rest)

    zero = [0.0] * len(weights)
    return Scored(
        r,
        student_logp=column(zero),
        teacher_logp=column(zero),
        divergence=column(divergence or zero),
        student_entropy=column(zero),
        teacher_entropy=column(zero),
        weights=column(weights),
        saliency=column([w - 1 for w in weights]),
        span_ids=torch.tensor((span or [-1] * len(weights)) + [99] * rest),
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_gini_is_bounded_and_blind_to_scale_and_order(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    g = credit_metrics.gini(x)
    assert 0 <= g <= 1
    assert credit_metrics.gini(3 * x.flip(0)) == pytest.approx(g, abs=1e-9)


def test_gini_of_known_distributions() -> None:
    assert credit_metrics.gini(torch.ones(10)) == pytest.approx(0)
    assert credit_metrics.gini(torch.tensor([0.0] * 9 + [5.0])) == pytest.approx(0.9)
    assert credit_metrics.gini(torch.zeros(4)) == 0


@given(st.lists(st.floats(0, 3), min_size=1, max_size=60))
def test_the_histogram_of_w_is_a_distribution(values: list[float]) -> None:
    bins = credit_metrics.w_histogram(torch.tensor(values))
    assert sum(bins.values()) == pytest.approx(1)
    ones = sum(abs(v - 1) < 5e-4 for v in values) / len(values)
    assert bins["credit/w_hist/0.999"] >= ones - 1e-9


def test_credit_metrics_read_generated_tokens_only() -> None:
    classes = [int(c) for c in (TokenClass.CALL_NAME, TokenClass.ARGUMENT, TokenClass.ARGUMENT, TokenClass.ANSWER)]
    r = rollout(1.0, classes=[*classes, 0, 0])
    m = credit_metrics.credit_metrics([scored(r, [2.0, 1.5, 1.0, 1.0], [0.8, 0.4, 0.0, 0.0], [0, 0, -1, -1])])
    assert not any(math.isnan(v) for v in m.values()), "an observed token was read"
    assert m["credit/mean_weight"] == pytest.approx(1.375)
    assert m["credit/mean_divergence"] == pytest.approx(0.3)
    assert m["credit/frac_salient"] == 0.5
    assert m["credit/frac_saturated"] == 0.25
    assert (m["credit/num_spans"], m["credit/mean_span_length"]) == (1, 2)
    assert (m["credit/inert"], m["credit/low_divergence"]) == (0, 0)
    assert m["credit/d/call_name"] == pytest.approx(0.8)
    assert m["credit/d/argument"] == pytest.approx(0.2)
    assert m["credit/mass/call_name"] == pytest.approx(2 / 3)
    assert "credit/d/format" not in m, "the observed tokens' class has no generated token"
    assert m["credit/mass_turn/0"] == pytest.approx(1)
    assert sum(m[f"credit/mass_decile/{i}"] for i in range(10)) == pytest.approx(1)
    assert m["credit/mass_decile/0"] == pytest.approx(2 / 3)


def test_credit_that_does_nothing_is_called_inert() -> None:
    m = credit_metrics.credit_metrics([scored(rollout(1.0), [1.0] * 4)])
    assert (m["credit/inert"], m["credit/mean_weight"], m["credit/gini"]) == (1.0, 1.0, 0.0)
    assert credit_metrics.credit_metrics([]) == {}


@pytest.mark.parametrize(
    ("weights", "divergence", "inert", "low"),
    [
        ([1.0] * 4, [0.5] * 4, 1, 0),  # every W is 1, whatever the divergence
        ([1.5] * 4, [0.0] * 4, 1, 1),  # every d is 0
        ([1.5, 1.0, 1.0, 1.0], [0.02, 0.0, 0.0, 0.0], 0, 1),  # the teacher hardly reads the reference
    ],
)
def test_inert_credit_is_not_low_divergence(
    weights: list[float], divergence: list[float], inert: int, low: int
) -> None:
    m = credit_metrics.credit_metrics([scored(rollout(1.0), weights, divergence)])
    assert (m["credit/inert"], m["credit/low_divergence"]) == (inert, low)


def test_spans_are_counted_over_all_rollouts() -> None:
    one = scored(rollout(1.0), [1.5] * 4, [0.5] * 4, [0, 0, 1, -1])
    other = scored(rollout(0.0), [1.5] * 4, [0.5] * 4, [4, 4, 4, -1])
    m = credit_metrics.credit_metrics([one, other])
    assert (m["credit/num_spans"], m["credit/mean_span_length"]) == (3, 2)
