"""Groups of siblings, and an environment that is gone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.trainer import toy
from tests.trainer.rollout.test_episode import RENDERER, Script, setup
from trainer.data import Group, Message, Outcome, Rollout
from trainer.engines.hf import HFEngine
from trainer.errors import EnvironmentBroken, EnvironmentLost, UserError
from trainer.learning.update import check_mask
from trainer.rollout.siblings import EnvironmentMonitor, run_group


def play_group(engine: Any, suite: toy.ParitySuite, n: int = 4, **env: Any) -> Group:
    return asyncio.run(run_group(setup(engine, suite, **env), suite.tasks("train")[0], n))


def groups(*tries: tuple[int, int, int]) -> list[Group]:
    """Groups as (number of the task, whole rollouts, broken ones)."""
    tasks = toy.ParitySuite().tasks("train")
    return [
        Group(tasks[i], [Rollout(tasks[i], [], [], [1])] * n, broken=bad, problem=f"why {i}") for i, n, bad in tries
    ]


def test_an_environment_is_lost_when_two_tasks_in_a_row_have_no_complete_rollout() -> None:
    monitor = EnvironmentMonitor(6)
    monitor.observe(groups((0, 0, 4)))
    monitor.observe(groups((0, 0, 4)))  # the same task again: it may be what is broken
    monitor.observe(groups((1, 0, 0)))  # too long to play, and not broken
    monitor.observe(groups((2, 3, 1), (3, 0, 4)))
    monitor.observe(groups((4, 0, 4)))
    with pytest.raises(EnvironmentLost, match=r"every rollout broke, of 2 tasks.*: why \d\. Fix that"):
        monitor.observe(groups((5, 0, 4)))
    with pytest.raises(EnvironmentLost, match="of 1 tasks"):
        EnvironmentMonitor(1).observe(groups((0, 0, 2)))


def test_a_broken_sibling_is_retried_once() -> None:
    boom = ("step", RuntimeError("boom"))
    whole = play_group(Script(*["w1"] * 9), toy.ParitySuite(faults=[boom]))
    assert (len(whole.rollouts), whole.broken) == (4, 1)
    smaller = play_group(Script(*["w1"] * 9), toy.ParitySuite(faults=[boom] * 6))
    assert (len(smaller.rollouts), smaller.broken) == (2, 6)
    assert all(r.reward == 0.0 and r.stop == "answer" for r in smaller.rollouts)


def test_groups_of_a_real_policy_are_whole_and_reproducible() -> None:
    model = toy.model()

    def once() -> list[Rollout]:
        engine = HFEngine(model, slots=8, stop_ids=RENDERER.stop_ids, max_length=200)
        made = play_group(engine, toy.ParitySuite(), n=8, max_turns=4)
        assert made.broken == 0
        return made.rollouts

    first, second = once(), once()
    assert [r.ids for r in first] == [r.ids for r in second]
    assert {r.reward for r in first} == {0.0, 1.0}
    for rollout in first:
        check_mask(rollout, RENDERER.stop_ids)


class Faulty:
    """The compact renderer, with a method that fails a number of times."""

    def __init__(self, method: str, times: int, fault: Exception) -> None:
        self.left = times

        def fail(*args: Any, **options: Any) -> Any:
            if self.left:
                self.left -= 1
                raise fault
            return getattr(RENDERER, method)(*args, **options)

        setattr(self, method, fail)

    def __getattr__(self, name: str) -> Any:
        return getattr(RENDERER, name)


@pytest.mark.parametrize("method", ["prompt", "parse", "classes", "observation"])
@pytest.mark.parametrize("fault", [TypeError("unhashable \ud83d"), RecursionError(), UserError("the template refuses")])
def test_a_fault_of_our_own_costs_one_rollout_and_leaves_a_report(method: str, fault: Exception) -> None:
    """Neither the run nor its group ends: the sibling is tried again, and what was said is kept."""
    suite = toy.ParitySuite()
    script = Script(*["say <call> peek at w1"] * 5, *["w1 w2"] * 5)
    shared = replace(setup(script, suite), renderer=Faulty(method, 1, fault))
    group = asyncio.run(run_group(shared, suite.tasks("train")[0], 4))
    assert (len(group.rollouts), group.broken, len(group.bugs)) == (4, 1, 1)
    (report,) = group.bugs
    assert repr(fault) in report.error and "Traceback" in report.traceback
    assert (
        report.text.startswith("say <call> peek") and report.ids[:3] == RENDERER.encode(["say", "<call>", "peek"])
    ) == (method != "prompt")
    assert suite.log.count("close") == 5


def test_an_adapter_that_fails_unforeseen_leaves_a_report_and_a_broken_world_none() -> None:
    failing = play_group(Script(*["w1"] * 9), toy.ParitySuite(faults=[("step", KeyError("x"))]))
    assert (failing.broken, len(failing.bugs)) == (1, 1)
    broken = play_group(Script(*["w1"] * 9), toy.ParitySuite(faults=[("step", toy.BROKEN)]))
    assert (broken.broken, broken.bugs) == (1, [])


@pytest.mark.parametrize("method", ["reset", "step", "outcome", "close"])
def test_an_exit_within_an_environment_ends_no_run(method: str) -> None:
    """Such as that of a policy's code, run in our process."""
    suite = toy.ParitySuite(faults=[(method, SystemExit(3))])
    group = play_group(Script(*["w1"] * 9), suite)
    assert len(group.rollouts) == 4
    assert (group.broken, [report.error for report in group.bugs]) == (
        (0, []) if method == "close" else (1, [f"{method}: RuntimeError('exit(3)')"])
    )


class Odd(toy.ParityEnvironment):
    """Says what no file or tokenizer takes as it is."""

    content: Any = "seen \ud83d"

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        messages, done = await super().step(message)
        return [{**m, "content": self.content} for m in messages], done


class OddSuite(toy.ParitySuite):
    def make(self) -> Odd:
        return Odd(self.log, self.faults)


def test_what_an_environment_says_is_made_encodable_at_the_door() -> None:
    group = play_group(Script(*["<call> peek at w1", "w1"] * 2), OddSuite(), n=1)
    assert [m["content"] for m in group.rollouts[0].messages] == ["", "seen \ufffd", "w1"]


def test_why_an_environment_broke_is_made_encodable_too() -> None:
    faults = [("step", EnvironmentBroken("no \ud83d"))] * 2
    assert play_group(Script(*["w1"] * 2), toy.ParitySuite(faults=faults), n=1).problem == "no \ufffd"


def test_a_numpy_word_on_success_is_a_bool(monkeypatch: pytest.MonkeyPatch) -> None:
    async def outcome(self: Any) -> Outcome:
        return Outcome(0.0, success=np.bool_(True))  # type: ignore[arg-type]

    monkeypatch.setattr(toy.ParityEnvironment, "outcome", outcome)
    group = play_group(Script("w1"), toy.ParitySuite(), n=1)
    assert group.rollouts[0].success is True


@pytest.mark.parametrize("content", [float("nan"), b"bytes", {1, 2}])
def test_what_an_environment_says_is_json(content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the run would end when its traces are written."""
    monkeypatch.setattr(Odd, "content", content)
    group = play_group(Script(*["<call> peek at w1"] * 2), OddSuite(), n=1)
    assert (len(group.rollouts), group.broken, len(group.bugs)) == (0, 2, 2)
