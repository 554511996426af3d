"""Suggestions for misspelt names: every one-letter slip is understood, and no other algorithm's name is 'corrected'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgcd_kernels import PolicyLossConfig
from sgcd_kernels.backends.protocol import IMPLS
from sgcd_kernels.core.spelling import explain_choice, nearest
from sgcd_kernels.core.surrogate import LOSS_TYPES, LOSSES_ELSEWHERE
from sgcd_kernels.core.validation import check_choice
from sgcd_kernels.credit.config import Rule
from sgcd_kernels.integrations.cut_cross_entropy import REDUCTIONS
from sgcd_kernels.ops.distill_loss import KINDS
from tests.properties import examples

ENUMERATIONS = {"loss_type": LOSS_TYPES, "impl": IMPLS, "rule": get_args(Rule), "kind": KINDS, "reduction": REDUCTIONS}


def slips(name: str) -> Iterator[str]:
    """Two neighbours swapped, a letter doubled or (beyond the first) left out, other case, other separators."""
    for i in range(len(name) - 1):
        yield name[:i] + name[i + 1] + name[i] + name[i + 2 :]
        yield name[: i + 1] + name[i:]
        yield name[: i + 1] + name[i + 2 :]
    yield name.upper()
    yield name.replace("_", "-")
    yield name.replace("_", "")


@pytest.mark.parametrize(
    ("argument", "option"), [(argument, option) for argument, names in ENUMERATIONS.items() for option in names]
)
def test_slips_are_understood(argument: str, option: str) -> None:
    """Except where a slip is as near to another option: then nothing is suggested, never the other one."""
    options = ENUMERATIONS[argument]
    found = [nearest(slip, options) for slip in slips(option) if slip not in options]
    assert set(found) <= {option, None}
    assert found.count(None) <= 1 and option in found


def test_the_nearest_and_not_its_neighbour() -> None:
    with pytest.raises(ValueError, match=r"loss_type is 'gpro', needs one of .*; did you mean 'grpo'[?]$"):
        PolicyLossConfig(loss_type="gpro")


@pytest.mark.parametrize("name", [*LOSSES_ELSEWHERE, "SAPO", "Sapo", "geo-mean"])
def test_a_loss_of_another_library_is_no_misspelling(name: str) -> None:
    with pytest.raises(ValueError, match="loss_type is") as error:
        PolicyLossConfig(loss_type=name)
    assert "did you mean" not in str(error.value)
    assert "this library does not have" in str(error.value) or "the clipped loss" in str(error.value)
    assert not set(LOSSES_ELSEWHERE) & set(LOSS_TYPES)


def test_every_name_of_the_installed_peers_is_known() -> None:
    """TRL says its in a help text; verl registers its own."""
    known = {*LOSS_TYPES, *LOSSES_ELSEWHERE}
    try:
        from verl.trainer.ppo import core_algos
    except ImportError:
        pytest.skip("verl is not installed")
    ours = {name for name in core_algos.POLICY_LOSS_REGISTRY if name.startswith("sgcd")}
    assert set(core_algos.POLICY_LOSS_REGISTRY) - ours <= known
    assert {str(getattr(name, "value", name)) for name in core_algos.ADV_ESTIMATOR_REGISTRY} <= known


@pytest.mark.parametrize("name", ["zapo", "xyz", "", "avg", "grpo2dapo", "a", "loss", "grpo_sapo"])
def test_what_resembles_nothing_gets_no_suggestion(name: str) -> None:
    assert explain_choice(name, LOSS_TYPES) == ""


@settings(max_examples=examples(200))
@given(st.text(max_size=12), st.sampled_from(sorted(ENUMERATIONS)))
def test_any_text_gives_a_message(value: str, argument: str) -> None:
    options = ENUMERATIONS[argument]
    if value in options:
        return
    assert nearest(value, options) in (None, *options)
    with pytest.raises(ValueError, match=f"{argument} is"):
        check_choice(argument, value, options)


@pytest.mark.parametrize("value", [None, 3, ["grpo"], b"grpo", {"loss_type": 1}])
def test_what_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"loss_type is .* needs one of"):
        PolicyLossConfig(loss_type=value)  # type: ignore[arg-type]
