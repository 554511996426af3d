"""Steps whose credit is not what the config asked for are named, with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sgcd_kernels import CreditConfig
from tests.trainer import toy
from tests.trainer.learning.test_scoring import groups
from tests.trainer.learning.test_update import RENDERER, learner, referenced
from trainer.config import WriterConfig
from trainer.data import Group
from trainer.learning.update import Learner
from trainer.records.credit_validity import invalid_credit, scarce_references
from trainer.stage_clock import Clock


@pytest.fixture(scope="module")
def model() -> Any:
    return toy.model("qwen3")


@pytest.fixture(scope="module")
def sampled(model: Any) -> list[Group]:
    made = groups(model, n=4, tasks=3)
    assert any(g.mixed for g in made)
    return made


def test_invalid_credit_is_named(model: Any, sampled: list[Group]) -> None:
    made = referenced(sampled)
    learning = learner(model)
    _, scored = learning.update(made, 1, Clock())
    assert invalid_credit(made, scored, learning.config) == ""
    flat = learning.config.model_copy(update={"credit": CreditConfig(d_floor=1e6)})
    _, unweighted = Learner.of(flat, copy.deepcopy(model), RENDERER, toy.ParitySuite()).update(made, 1, Clock())
    assert "every weight is 1" in invalid_credit(made, unweighted, flat)
    for s in (s for row in scored for s in row):
        s.divergence.zero_()
    assert "every divergence is 0" in invalid_credit(made, scored, learning.config)
    scored[0][0].divergence.requires_grad_()
    assert "gradient" in invalid_credit(made, scored, learning.config)


def test_missing_references_are_named_with_their_reasons(model: Any, sampled: list[Group]) -> None:
    """Where no group has one, every weight is 1, and that is not what the config asked for."""
    config = learner(model).config
    mixed = next(g for g in sampled if g.mixed)
    bare = [Group(mixed.task, mixed.rollouts, "", {"error": why}) for why in ("truncated", "truncated", "timeout")]
    problem = invalid_credit(bare, [], config)
    assert problem.startswith(
        "3 of 3 mixed groups have no reference and train with W = 1 (truncated 2, timeout 1; raise"
    )
    assert "writer.max_tokens" in problem and "max_tokens" not in scarce_references(bare[2:], config)
    with_reference = referenced([mixed])
    assert "2 of 3 mixed" in scarce_references([*with_reference, *bare[1:]], config)
    assert scarce_references([*with_reference, *bare[2:]], config) == ""
    assert scarce_references([g for g in sampled if not g.mixed], config) == ""
    none = config.model_copy(update={"writer": WriterConfig(name="none")})
    assert invalid_credit(bare, [], none) == ""
