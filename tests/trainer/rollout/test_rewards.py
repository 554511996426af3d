"""Graded rewards: which groups train, which siblings count as successes, and whose fault a bad value is."""

from __future__ import annotations

import asyncio
import functools
import re
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties import examples
from tests.trainer.siblings import rollout, task
from trainer.config import RewardConfig
from trainer.data import Group, Outcome, Rollout
from trainer.errors import EnvironmentBroken, UserError
from trainer.learning.update import group_advantages
from trainer.records.rollout_metrics import rollout_metrics
from trainer.references.writers import ContrastWriter
from trainer.rollout import rewards
from trainer.rollout.rewards import Grading, Reward


def graded(*values: float, grading: Grading | None = None, success: Sequence[bool | None] = ()) -> Group:
    """A group whose verifier gave these rewards, as `run_group` would leave it."""
    words = success or [None] * len(values)
    made = Group(task(), [rollout(["look"] if value > 0 else ["act"], 0.0) for value in values])
    for one, value, word in zip(made.rollouts, values, words, strict=True):
        asyncio.run((grading or Grading()).grade(one, Outcome(value, success=word), 1.0))
    (grading or Grading()).judge(made.rollouts)
    return made


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.2, 0.5, 0.8, 1.0, 3.0]), min_size=2, max_size=8))
@settings(max_examples=examples(100))
def test_a_group_is_mixed_exactly_when_it_has_a_gradient_and_then_it_contrasts(values: list[float]) -> None:
    group = graded(*values)
    assert group.mixed == any(abs(a) > 1e-9 for a in group_advantages([group], scale=False))
    assert group.contrasts == group.mixed
    asyncio.run(ContrastWriter().write([group]))
    assert bool(group.reference) == group.mixed
    for one in group.rollouts:
        if group.mixed:
            assert one.success == (one.reward > fmean(values))


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0.2, 0.8), (0, 1), (1, 2), (5, 5 + 1e-12), (1 - 2**-53, 1.0)])
def test_the_better_sibling_is_the_success_whatever_the_scale(low: float, high: float) -> None:
    assert [r.success for r in graded(low, high, low).rollouts] == [False, True, False]


def test_without_a_difference_full_reward_is_success() -> None:
    assert [r.success for r in graded(1.0, 1.0).rollouts] == [True, True]
    assert [r.success for r in graded(0.5, 0.5).rollouts] == [False, False]
    assert [r.success for r in graded(2.0).rollouts] == [True]


def test_the_verifiers_word_and_the_threshold() -> None:
    assert [r.success for r in graded(0.2, 0.9, success=[True, False]).rollouts] == [True, False]
    at = Grading(success_threshold=0.5)
    assert [r.success for r in graded(0.2, 0.5, 0.9, grading=at, success=[True, None, False]).rollouts] == [
        False,
        True,
        True,
    ]


def test_a_mixed_group_without_contrast_trains_without_a_reference_and_says_why() -> None:
    group = graded(0.6, 0.9, grading=Grading(success_threshold=0.5))
    assert group.mixed and not group.contrasts
    asyncio.run(ContrastWriter().write([group]))
    assert (group.reference, group.reference_info["error"]) == ("", "all_succeeded")
    failed = graded(0.1, 0.2, grading=Grading(success_threshold=0.5))
    asyncio.run(ContrastWriter().write([failed]))
    assert failed.reference_info["error"] == "all_failed"


class Odd:
    def __float__(self) -> float:
        raise KeyError("no number")

    def __repr__(self) -> str:
        raise ZeroDivisionError


BAD = [
    float("nan"),
    float("inf"),
    -float("inf"),
    None,
    "1",
    b"1",
    [],
    10**400,
    1e7,
    1j,
    torch.ones(2),
    torch.tensor(float("nan")),
    object(),
    Odd(),
    bytearray(b"1"),
    np.array("1"),
    np.str_("1"),
    np.complex64(1),
    np.ma.masked,
    torch.tensor(1 + 0j),
    torch.empty((), device="meta"),
]


@pytest.mark.parametrize("value", BAD, ids=lambda v: type(v).__name__)
@pytest.mark.filterwarnings("ignore:.*masked element")
def test_what_is_no_number_is_named_and_never_scored(value: Any) -> None:
    with pytest.raises(EnvironmentBroken, match="the verifier's reward: needs a number"):
        asyncio.run(Grading().grade(rollout([], 0.0), Outcome(value), 1.0))
    mine = Grading((Reward("mine", 1.0, lambda _: value),))
    with pytest.raises(EnvironmentBroken, match="rewards: mine: needs a number"):
        asyncio.run(mine.grade(rollout([], 0.0), Outcome(0.0), 1.0))


@pytest.mark.parametrize("value", [True, 1, np.float32(1), np.int64(1), torch.tensor(1.0), torch.ones(1), Fraction(1)])
def test_every_kind_of_number_is_a_reward(value: Any) -> None:
    one = rollout([], 0.0)
    asyncio.run(Grading().grade(one, Outcome(value), 1.0))
    assert one.reward == 1.0 and type(one.reward) is float


async def shortness(rollout: Rollout) -> float:
    await asyncio.sleep(0)
    return -float(len(rollout.messages))


def test_components_are_weighted_and_kept() -> None:
    parts = (Reward("verifier", 2.0), Reward("short", 0.1, shortness), Reward("seen", 1.0, lambda r: r.reward * 10))
    one = rollout(["look"], 0.0)  # three messages
    asyncio.run(Grading(parts).grade(one, Outcome(0.5), 1.0))
    assert one.components == {"verifier": 0.5, "short": -3.0, "seen": 5.0}
    assert one.reward == pytest.approx(1.0 - 0.3 + 5.0)
    group = Group(task(), [one])
    assert rollout_metrics([group])["reward/short"] == -3.0


def raising(rollout: Rollout) -> float:
    raise KeyError("answer")


def sleeping(rollout: Rollout) -> float:
    time.sleep(0.5)
    return 1.0


def stopping(rollout: Rollout) -> float:
    return next(iter(()))


def exiting(rollout: Rollout) -> float:
    sys.exit(3)


def timed_out(rollout: Rollout) -> float:
    raise TimeoutError("of its own server")


async def leaving(rollout: Rollout) -> float:
    sys.exit(4)


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (raising, "KeyError('answer')"),
        (stopping, "StopIteration()"),
        (exiting, "SystemExit(3)"),
        (leaving, "SystemExit(4)"),
        (timed_out, "TimeoutError('of its own server')"),
    ],
)
def test_what_a_function_raises_is_named_and_drops_the_rollout(function: Any, shown: str) -> None:
    with pytest.raises(EnvironmentBroken, match=re.escape(f"rewards: mine: {shown}")):
        asyncio.run(Grading((Reward("mine", 1.0, function),)).grade(rollout([], 0.0), Outcome(0.0), 60.0))


class Judge:
    async def __call__(self, rollout: Rollout) -> float:
        return await shortness(rollout)


@pytest.mark.parametrize("function", [shortness, Judge(), functools.partial(shortness), lambda r: shortness(r)])
def test_asynchronous_functions_of_every_kind_are_awaited(function: Any) -> None:
    one = rollout(["look"], 0.0)
    asyncio.run(Grading((Reward("mine", 1.0, function),)).grade(one, Outcome(0.0), 60.0))
    assert one.reward == -3.0


def test_a_function_that_blocks_is_named() -> None:
    with pytest.raises(EnvironmentBroken, match=r"rewards: mine took longer than env.timeout = 0.05 s"):
        asyncio.run(Grading((Reward("mine", 1.0, sleeping),)).grade(rollout([], 0.0), Outcome(0.0), 0.05))


MODULE = """
def brevity(rollout):
    return 1.0 / (1 + len(rollout.messages))
def two(rollout, other): ...
value = 3
"""


def test_functions_are_loaded_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])

    def load(*configs: dict[str, Any]) -> Grading:
        return rewards.load([RewardConfig(**c) for c in configs], None)

    found = load({"path": "verifier"}, {"path": "my_rewards:brevity", "weight": 0.1, "name": "short"})
    assert [(r.name, r.weight) for r in found.rewards] == [("verifier", 1.0), ("short", 0.1)]
    assert found.rewards[1].function is not None
    for path, why in {
        "no_such_module:f": "ModuleNotFoundError",
        "my_rewards:missing": "AttributeError",
        "broken_rewards:f": "ZeroDivisionError",
        "my_rewards:two": "must be a function of one rollout",
        "my_rewards:value": "must be a function of one rollout",
    }.items():
        with pytest.raises(UserError, match=f"rewards: {path}.*{why}"):
            load({"path": path})
    with pytest.raises(UserError, match="brevity occurs twice"):
        load({"path": "my_rewards:brevity"}, {"path": "my_rewards:brevity"})
    with pytest.raises(UserError) as both:
        load({"path": "a_b:f"}, {"path": "c_d:f"})
    assert len(both.value.lines) == 2


@pytest.mark.parametrize("path", ["brevity", "module:", ":f", "a b:f", "a/b:f", "a..b:f", ""])
def test_a_path_that_is_no_import_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="needs module:function or verifier"):
        RewardConfig(path=path)
