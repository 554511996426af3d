"""credit_weights: SGCD's rule against the left-to-right reference, its bounds, its ablations, its neighbours."""

from __future__ import annotations

import dataclasses
import math
import statistics
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgcd_kernels import CreditConfig, credit_weights, reference
from sgcd_kernels.credit.rules import RULES
from tests.properties import examples
from tests.speed import cpu_seconds

CU = torch.tensor([0, 30, 30, 31, 90])


def signals(n: int = 90, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "divergence": torch.rand(n, generator=g) ** 6,
        "teacher_entropy": torch.rand(n, generator=g),
        "cu_seqlens": CU,
    }


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], CreditConfig]:
    lengths = draw(st.lists(st.integers(0, 25), min_size=1, max_size=4))
    n, seed = sum(lengths), draw(st.integers(0, 2**20))
    g = torch.Generator().manual_seed(seed)
    inputs = {
        "divergence": draw(st.sampled_from([0.0, 1e-3, 1.0, 50.0]))
        * torch.rand(n, generator=g) ** draw(st.integers(1, 9)),
        "teacher_entropy": torch.rand(n, generator=g) * draw(st.sampled_from([0.05, 3.0])),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "mask": torch.rand(n, generator=g) < draw(st.sampled_from([0.0, 0.6, 1.0])),
        "turn_ids": (torch.rand(n, generator=g) < 0.15).cumsum(0),
    }
    cfg = CreditConfig(
        gamma=draw(st.sampled_from([0.0, 0.5, 1.0, 4.0])),
        clip=draw(st.sampled_from([1.0, 1.5, 2.0])),
        quantile=draw(st.sampled_from([0.5, 0.99, 1.0])),
        patience=draw(st.integers(1, 5)),
        reset=draw(st.sampled_from([0.0, 0.02, 0.1])),
        span_value=draw(st.sampled_from(["onset", "own"])),
    )
    return inputs, cfg


@given(rollouts())
@settings(max_examples=examples(120))
def test_sgcd_equals_reference_and_keeps_its_bounds(case: tuple[dict[str, torch.Tensor], CreditConfig]) -> None:
    inputs, cfg = case
    got = credit_weights(**inputs, config=cfg)
    assert ((got.weights >= 1) & (got.weights <= cfg.clip)).all()
    assert ((got.saliency >= 0) & (got.saliency <= 1)).all()
    mask = inputs["mask"]
    assert (got.weights[~mask] == 1).all()
    assert (got.saliency[~mask] == 0).all()
    assert (got.span_ids[~mask] == -1).all()
    advantages = torch.randn_like(got.weights)
    assert torch.equal((advantages * got.weights).sign(), advantages.sign())
    spans = 0
    for start, stop in zip(inputs["cu_seqlens"][:-1], inputs["cu_seqlens"][1:]):
        at = torch.arange(int(start), int(stop))[mask[start:stop]]
        if len(at) == 0:
            continue
        lists = [inputs[k][at].double().tolist() for k in ("divergence", "teacher_entropy")]
        w, s, ids = reference.sgcd_credit(*lists, inputs["turn_ids"][at].tolist(), cfg)
        torch.testing.assert_close(got.weights[at], torch.tensor(w), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.saliency[at], torch.tensor(s), rtol=1e-5, atol=1e-6)
        assert got.span_ids[at].tolist() == [i + spans if i >= 0 else -1 for i in ids]
        spans += max(ids) + 1


@given(rollouts())
@settings(max_examples=examples(60))
def test_spans_cross_neither_sequence_nor_turn(case: tuple[dict[str, torch.Tensor], CreditConfig]) -> None:
    inputs, cfg = case
    got = credit_weights(**inputs, config=cfg)
    sequence = torch.arange(len(inputs["cu_seqlens"]) - 1).repeat_interleave(inputs["cu_seqlens"].diff())
    for span in range(int(got.span_ids.max()) + 1 if got.span_ids.numel() else 0):
        at = got.span_ids == span
        assert sequence[at].unique().numel() == 1
        assert inputs["turn_ids"][at].unique().numel() == 1


def sgcd(d: list[float], h: list[float] | None = None, turns: list[int] | None = None, **config: Any) -> list[float]:
    out = credit_weights(
        torch.tensor(d),
        torch.zeros(len(d)) if h is None else torch.tensor(h),
        torch.tensor([0, len(d)]),
        turn_ids=None if turns is None else torch.tensor(turns),
        config=CreditConfig(**{"quantile": 1.0} | config),
    )
    return out.saliency.tolist()


def test_a_span_by_hand() -> None:
    assert sgcd([0, 1, 0, 0, 0, 0], patience=3) == [0, 1, 1, 1, 0, 0]  # the third quiet token ends it
    assert sgcd([0, 1, 0, 0.5, 0, 0], patience=2) == [0, 1, 1, 1, 1, 0]  # noise in between starts the count again
    assert sgcd([0, 1, 0, 0.5, 0, 0], patience=1) == [0, 1, 0, 0.5, 0, 0]
    assert sgcd([0, 0.5, 1, 0], patience=9) == [0, 0.5, 0.5, 0.5]  # the onset's value, whatever follows
    assert sgcd([0, 0.5, 1, 0], patience=9, span_value="own") == [0, 0.5, 1, 0]
    assert sgcd([1, 0, 0, 0], [1.0, 1.5, 1.51, 1.0]) == [1, 1, 0, 0]  # entropy more than half above the onset's
    assert sgcd([1, 0, 0, 0], [0.1, 0.15, 0.19, 0.21]) == [1, 1, 1, 0]  # and by the margin at least
    assert sgcd([1, 0.5, 0, 0], [0.1, 0.9, 0.9, 0.9]) == [1, 0.5, 0.5, 0.5]  # what ends one span may start the next
    assert sgcd([1, 0, 0, 0], turns=[0, 0, 1, 1]) == [1, 1, 0, 0]


def test_floor_keeps_a_useless_reference_from_spiking() -> None:
    d = [0.005, 0.0, 0.009, 0.0]
    assert sgcd(d) == [0, 0, 0, 0]
    assert max(sgcd(d, d_floor=1e-6, span_value="own")) == 1


def test_quantile_is_over_eligible_tokens_only() -> None:
    d = torch.tensor([100.0, 1.0, 0.5, 0.0])
    mask = torch.tensor([False, True, True, True])
    cfg = CreditConfig(quantile=1.0, span_value="own")
    got = credit_weights(d, torch.zeros(4), torch.tensor([0, 4]), mask=mask, config=cfg)
    assert got.saliency.tolist() == [0, 1, 0.5, 0]


def test_no_reference_or_gamma_zero_gives_exactly_one() -> None:
    inputs = signals()
    for changed, cfg in (
        (inputs | {"divergence": torch.zeros(90)}, CreditConfig()),
        (inputs | {"mask": torch.zeros(90)}, CreditConfig()),
        (inputs, CreditConfig(gamma=0.0)),
        (inputs, CreditConfig(rule="none")),
    ):
        assert (credit_weights(**changed, config=cfg).weights == 1).all()


def test_ablations() -> None:
    inputs = signals() | {"mask": torch.arange(90) % 5 != 0}
    base = credit_weights(**inputs)
    uniform = credit_weights(**inputs, config=CreditConfig(rule="uniform", gamma=0.7))
    assert (uniform.weights == torch.where(inputs["mask"], 1.7, 1.0)).all()
    matched = credit_weights(**inputs, config=CreditConfig(rule="matched_uniform"))
    permuted = credit_weights(**inputs, config=CreditConfig(rule="permuted", seed=3))
    assert not torch.equal(permuted.weights, base.weights)
    assert torch.equal(permuted.weights, credit_weights(**inputs, config=CreditConfig(rule="permuted", seed=3)).weights)
    assert not torch.equal(
        permuted.weights, credit_weights(**inputs, config=CreditConfig(rule="permuted", seed=4)).weights
    )
    for start, stop in pairwise(CU):
        at = torch.arange(int(start), int(stop))[inputs["mask"][start:stop]]
        torch.testing.assert_close(
            matched.weights[at], base.weights[at].mean().expand(len(at)) if len(at) else matched.weights[at]
        )
        assert torch.equal(permuted.weights[at].sort().values, base.weights[at].sort().values)
    assert (permuted.weights[~inputs["mask"]] == 1).all()


def test_related_methods_by_formula() -> None:
    n, cu = 40, torch.tensor([0, 40])
    g = torch.Generator().manual_seed(1)
    delta, a = torch.randn(n, generator=g), torch.randn(n, generator=g)
    h, kl, bc = (torch.rand(n, generator=g) for _ in range(3))
    inputs = {"divergence": kl, "teacher_entropy": h, "cu_seqlens": cu, "advantages": a, "log_ratio": delta}
    inputs |= {"forward_kl": kl, "bhattacharyya": bc, "student_entropy": h}

    def weights(rule: str, **fields: Any) -> torch.Tensor:
        return credit_weights(**inputs, config=CreditConfig(rule=rule, **fields)).weights

    ratio = (a.sign() * delta).exp().clamp(0.8, 1.2)
    torch.testing.assert_close(weights("rlsd"), 0.5 + 0.5 * ratio)
    assert (weights("rlsd", rlsd_lambda=0.0) == 1).all()
    torch.testing.assert_close(weights("sc_grpo"), kl / (kl + kl.quantile(0.75)))
    torch.testing.assert_close(weights("egrsd"), ratio * (1 - 0.3 * h / h.max()).clamp(0.1, 1))
    dgpo = weights("dgpo")
    torch.testing.assert_close(dgpo, n * torch.softmax((1 - bc).sqrt() * h / h.max() / 0.5, 0))
    assert float(dgpo.mean()) == pytest.approx(1.0)
    gear = credit_weights(**inputs, config=CreditConfig(rule="gear"))
    torch.testing.assert_close(gear.weights, 0.2 * (0.5 + (0.5 - gear.saliency) * a.sign()) + 0.9)
    assert gear.weights.min() >= 0.9 - 1e-6
    assert gear.weights.max() <= 1.1 + 1e-6
    own = (-delta / (-delta).quantile(0.99)).clamp(0, 1)
    outside = gear.span_ids < 0
    torch.testing.assert_close(gear.saliency[outside], own[outside])


def test_turn_level_by_hand() -> None:
    """Two turns of unequal length, not side by side; a sequence of one turn; a sequence without eligible tokens."""
    delta = torch.tensor([1.0, -0.5, 2.0, 0.0, 9.0, 0.7, 0.9, 5.0])
    turns = torch.tensor([7, 2, 7, 7, 2, 2, 2, 2])
    # The means are 1 and -.5; the second token of turn 2 is not eligible.
    mask = torch.tensor([1, 1, 1, 1, 0, 1, 1, 0])
    a = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    given = {"cu_seqlens": torch.tensor([0, 5, 7, 8]), "mask": mask, "turn_ids": turns, "advantages": a}
    config = CreditConfig(rule="turn_level", turn_epsilon=0.3)
    got = credit_weights(torch.zeros(8), torch.zeros(8), log_ratio=delta, config=config, **given)
    t = math.tanh(1.0)  # two turns lie one standard deviation above and below their mean
    want = [1 + 0.3 * t, 1 - 0.3 * t, 1 + 0.3 * t, 1 - 0.3 * t, 1, 1, 1, 1]
    torch.testing.assert_close(got.weights, torch.tensor(want))
    agrees = credit_weights(torch.zeros(8), torch.zeros(8), log_ratio=torch.zeros(8), config=config, **given)
    assert (agrees.weights == 1).all()
    with pytest.raises(ValueError, match="turn_ids is None, needs one value per token for rule 'turn_level'"):
        credit_weights(torch.zeros(8), torch.zeros(8), log_ratio=delta, config=config, **given | {"turn_ids": None})


@given(rollouts())
@settings(max_examples=examples(60))
def test_turn_level_turn_by_turn(case: tuple[dict[str, torch.Tensor], CreditConfig]) -> None:
    inputs, _ = case
    n = inputs["divergence"].numel()
    g = torch.Generator().manual_seed(n)
    turns = torch.randint(-1, 3, (n,), generator=g)  # out of order, some absent
    delta, a = torch.randn(n, generator=g).double(), torch.randn(n, generator=g)
    config = CreditConfig(rule="turn_level")
    got = credit_weights(**inputs | {"turn_ids": turns}, log_ratio=delta.float(), advantages=a, config=config).weights
    want = torch.ones(n, dtype=torch.float64)
    for start, stop in pairwise(inputs["cu_seqlens"].tolist()):
        tokens = [t for t in range(start, stop) if inputs["mask"][t]]
        means = {
            i: statistics.fmean(float(delta[t]) for t in tokens if turns[t] == i) for i in set(turns[tokens].tolist())
        }
        if len(means) > 1:
            centre, deviation = statistics.fmean(means.values()), statistics.pstdev(means.values())
            for t in tokens:
                z = (means[int(turns[t])] - centre) / deviation
                want[t] += 0.2 * math.tanh(math.copysign(z, z * float(a[t])))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_advantages_per_sequence_are_repeated_per_token() -> None:
    inputs = signals() | {"log_ratio": torch.randn(90)}
    a = torch.tensor([1.0, 1.0, -1.0, -1.0])
    by_token = a.repeat_interleave(CU.diff())
    cfg = CreditConfig(rule="rlsd")
    assert torch.equal(
        credit_weights(**inputs, advantages=a, config=cfg).weights,
        credit_weights(**inputs, advantages=by_token, config=cfg).weights,
    )


@pytest.mark.parametrize(
    ("rule", "missing"),
    [
        ("gear", "advantages"),
        ("rlsd", "advantages"),
        ("egrsd", "advantages"),
        ("sc_grpo", "forward_kl"),
        ("dgpo", "bhattacharyya"),
        ("turn_level", "advantages"),
    ],
)
def test_a_missing_input_is_named(rule: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"{missing} is None, needs one value per token for rule '{rule}'"):
        credit_weights(**signals(), config=CreditConfig(rule=rule))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_aborts_on_what_it_reads_and_on_nothing_else(rule: str) -> None:
    names = ("divergence", "teacher_entropy", "advantages", "log_ratio", "forward_kl", "bhattacharyya")
    g = torch.Generator().manual_seed(0)
    inputs = {name: torch.rand(90, generator=g) for name in (*names, "student_entropy")}
    shape = {"cu_seqlens": CU, "turn_ids": torch.arange(90) // 10}
    config = CreditConfig(rule=rule)
    want = credit_weights(**inputs, **shape, config=config)
    for name in inputs:
        broken = inputs | {name: torch.full((90,), torch.nan)}
        if name in RULES[rule].reads:
            with pytest.raises(ValueError, match=f"{name} holds 90 NaN or infinite values"):
                credit_weights(**broken, **shape, config=config)
        else:
            got = credit_weights(**broken, **shape, config=config)
            assert all(torch.equal(ours, plain) for ours, plain in zip(got, want))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rule", "sgdc"),
        ("gamma", -1.0),
        ("clip", 0.5),
        ("quantile", 0.0),
        ("quantile", 1.5),
        ("d_floor", 0.0),
        ("start", 2.0),
        ("reset", 0.5),
        ("patience", 0),
        ("patience", 1.5),
        ("entropy_ratio", 0.9),
        ("entropy_margin", float("nan")),
        ("span_value", "mean"),
        ("dgpo_tau", 0.0),
        ("rlsd_lambda", 1.1),
        ("turn_epsilon", 1.5),
        ("d_floor", "1e-2"),
        ("gamma", None),
        ("gamma", True),
        ("reset", "0"),
        ("patience", True),
        ("seed", 1.5),
    ],
)
def test_config_refuses_by_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} is "):
        CreditConfig(**{field: value})


def test_config_inside_pydantic() -> None:
    pydantic = pytest.importorskip("pydantic")

    class Outer(pydantic.BaseModel):
        credit: CreditConfig = CreditConfig()

    assert Outer(credit={"gamma": 2}).credit == CreditConfig(gamma=2.0)
    with pytest.raises(pydantic.ValidationError, match="gama"):
        Outer(credit={"gama": 2})
    with pytest.raises(pydantic.ValidationError, match=r"clip is 0\.5"):
        Outer(credit={"clip": 0.5})
    with pytest.raises(dataclasses.FrozenInstanceError):
        CreditConfig().gamma = 3.0


def test_carries_no_gradient() -> None:
    d = torch.rand(8, requires_grad=True)
    assert not credit_weights(d, torch.rand(8), torch.tensor([0, 8])).weights.requires_grad


@pytest.mark.parametrize("spans", ["one", "many"])
def test_ten_times_the_tokens_take_no_more_than_thirty_times_as_long(spans: str) -> None:
    def seconds(n: int) -> float:
        if spans == "one":
            case = torch.rand(n), torch.ones(n), torch.tensor([0, n])
        else:
            case = torch.rand(n) ** 8, torch.rand(n), torch.arange(0, n + 1, 100)
        return cpu_seconds(lambda: credit_weights(*case))

    assert seconds(50_000) < 30 * seconds(5_000)
