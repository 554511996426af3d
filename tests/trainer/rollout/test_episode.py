"""Episodes and groups: what is appended, what stops them, and what a broken world costs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from tests.trainer import toy
from trainer.config import EnvConfig
from trainer.data import Completion, Rollout, Sampling, Task
from trainer.errors import EnvironmentBroken, PromptTooLong
from trainer.learning.update import check_mask
from trainer.rollout.episode import RolloutSetup, play_episode

RENDERER = toy.renderer()


class Script:
    """An engine that says given turns: the episode's side of the protocol, without a policy."""

    def __init__(self, *turns: str | Completion) -> None:
        self.turns = list(turns)
        self.prompts: list[list[int]] = []

    async def generate(self, prompt_ids: Sequence[int], n: int, sampling: Sampling) -> list[Completion]:
        self.prompts.append(list(prompt_ids))
        turn = self.turns.pop(0)
        if isinstance(turn, Completion):
            return [turn]
        ids = RENDERER.encode([*turn.split(), "<end>"])
        return [Completion(ids, [-0.5] * len(ids), "stop")]


def setup(engine: Any, suite: toy.ParitySuite, max_length: int = 200, **env: Any) -> RolloutSetup:
    return RolloutSetup(engine, suite, RENDERER, Sampling(), EnvConfig(**{"timeout": 5.0, **env}), max_length)


def play(engine: Any, suite: toy.ParitySuite, max_length: int = 200, **env: Any) -> Rollout:
    return asyncio.run(play_episode(setup(engine, suite, max_length, **env), suite.tasks("train")[0]))


class Counting(Script):
    """Says as many words as it may."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[int] = []

    async def generate(self, prompt_ids: Sequence[int], n: int, sampling: Sampling) -> list[Completion]:
        self.rooms.append(sampling.max_tokens)
        ids = RENDERER.encode(["<call>", "peek", "at", "w1", "<end>"])[-min(5, sampling.max_tokens) :]
        done = len(ids) == 5
        return [Completion(ids, [-0.5] * len(ids), "stop" if done else "length")]


@pytest.mark.parametrize("limit", [4, 5, 12, 40])
def test_a_response_never_outgrows_its_limit(limit: int) -> None:
    """Turns and observations together; what does not fit ends the episode as a full context does."""
    engine = Counting()
    rollout = play(engine, toy.ParitySuite(), max_turns=9, max_response_tokens=limit)
    free = play(Counting(), toy.ParitySuite(), max_turns=9)
    assert len(rollout.ids) <= limit < len(free.ids)
    assert rollout.ids[:-4] == free.ids[: len(rollout.ids) - 4]  # its last turn may be shorter
    assert rollout.stop == "context" and free.stop == "max_turns"
    assert engine.rooms[0] == min(limit, Sampling().max_tokens)


def encode(text: str) -> list[int]:
    return RENDERER.encode(text.split())


def contents(rollout: Rollout) -> list[str]:
    return [m["content"] for m in rollout.messages]


def test_an_episode_appends_what_was_sampled_and_what_was_observed() -> None:
    engine = Script("say <call> peek at w1", "w1 w2")
    suite = toy.ParitySuite()
    rollout = play(engine, suite)
    said = "say <call> peek at w1 <end> <tool> seen w1 w2 w3 <end> <assistant> w1 w2 <end>"
    assert rollout.ids == encode(said)
    assert rollout.generated == [True] * 6 + [False] * 7 + [True] * 3
    assert rollout.logprobs == [-0.5] * 6 + [0.0] * 7 + [-0.5] * 3
    assert rollout.turns == [0] * 13 + [1] * 3
    assert len(rollout.classes) == len(rollout.ids)
    assert rollout.prompt_ids == encode("<user> say w0 even <end> <assistant>")
    assert engine.prompts[1] == rollout.prompt_ids + rollout.ids[:13]
    assert (rollout.stop, rollout.reward, rollout.details) == ("answer", 1.0, {"words": 2})
    assert [m["role"] for m in rollout.messages] == ["assistant", "tool", "assistant"]
    assert suite.log[-1] == "close"
    check_mask(rollout, RENDERER.stop_ids)


@pytest.mark.parametrize(
    ("turn", "problem"),
    [("<call> peek at", "peek needs pairs"), ("<call> poke at w1", "unknown tool poke")],
)
def test_a_bad_call_is_observed_and_never_run(turn: str, problem: str) -> None:
    suite = toy.ParitySuite()
    rollout = play(Script(turn, "w1"), suite)
    assert problem in json.loads(contents(rollout)[1])["error"]
    assert suite.log.count("step") == 1  # the answer's
    assert rollout.stop == "answer"


def test_a_good_call_beside_an_unknown_one_is_not_run_either() -> None:
    suite = toy.ParitySuite()
    rollout = play(Script("<call> peek at w1 <call> poke at w1", "w1"), suite)
    assert ["in another call" in contents(rollout)[1], "unknown tool poke" in contents(rollout)[2]] == [True, True]
    assert [m["tool_call_id"] for m in rollout.messages[1:3]] == ["call_0", "call_1"]
    assert suite.log.count("step") == 1


def test_stops_and_ends_in_its_own_words() -> None:
    peek = "<call> peek at w1"
    limited = play(Script(peek, peek, peek), toy.ParitySuite(), max_turns=3)
    assert limited.stop == "max_turns"
    assert limited.generated[-1]
    cut = Completion(RENDERER.encode(["<call>", "peek"]), [-1.0, -1.0], "length")
    suite = toy.ParitySuite()
    halved = play(Script(cut), suite)
    assert halved.stop == "length"
    assert "step" not in suite.log  # half a call is no call
    crowded = play(Script(peek, "w1"), toy.ParitySuite(), max_length=6 + 5 + 7)
    assert (crowded.stop, len(crowded.ids)) == ("context", 5)
    full = play(Script(cut), toy.ParitySuite(), max_length=8)
    assert full.stop == "context"


def test_observations_are_cut() -> None:
    rollout = play(Script("<call> peek at w1", "w1"), toy.ParitySuite(), max_observation_chars=12)
    assert contents(rollout)[1] == "see ...[cut]"


def test_a_prompt_that_does_not_fit_is_the_users_to_mend() -> None:
    with pytest.raises(PromptTooLong, match=r"model\.max_length: 6 .* train-0 has 6"):
        play(Script(), toy.ParitySuite(), max_length=6)


@pytest.mark.parametrize("method", ["reset", "step", "outcome"])
@pytest.mark.parametrize("fault", [RuntimeError("boom"), toy.BROKEN, 10.0])
def test_a_broken_environment_drops_the_rollout_and_is_closed(method: str, fault: Any) -> None:
    suite = toy.ParitySuite(faults=[(method, fault)])
    with pytest.raises(EnvironmentBroken):
        play(Script("w1"), suite, timeout=0.05)
    assert suite.log[-1] == "close"


def test_a_failing_close_costs_nothing() -> None:
    play(Script("w1"), toy.ParitySuite(faults=[("close", RuntimeError("boom"))]))


def test_an_engine_that_breaks_is_not_the_environments_fault() -> None:
    class Broken(Script):
        async def generate(self, prompt_ids: Sequence[int], n: int, sampling: Sampling) -> list[Completion]:
            raise RuntimeError("no memory")

    suite = toy.ParitySuite()
    with pytest.raises(RuntimeError, match="no memory"):
        play(Broken(), suite)
    assert suite.log[-1] == "close"


@pytest.mark.parametrize(("token", "message"), [(6, "after the turn's end"), (8, "in the middle of an observation")])
def test_a_mask_that_covers_an_observation_is_refused(token: int, message: str) -> None:
    rollout = play(Script("say <call> peek at w1", "w1 w2"), toy.ParitySuite())
    rollout.generated[token] = True
    with pytest.raises(RuntimeError, match=message):
        check_mask(rollout, RENDERER.stop_ids)


def test_tasks_data_is_not_shown() -> None:
    suite = toy.ParitySuite()
    task = Task("t", "parity", "train", "s", "information", "say w1", {"secret": "w7"})
    rollout = asyncio.run(play_episode(setup(Script("w1"), suite), task))
    assert "w7" not in RENDERER.decode(rollout.prompt_ids + rollout.ids)
