"""The BFCL adapter against the benchmark's own gold: every one of the 800 conversations is played."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

if not os.environ.get("SGCD_REQUIRE_PACKAGES"):
    pytest.importorskip("bfcl_eval", reason="bfcl-eval is not installed; `make test` installs it")

from scripts.bfcl_model.gold_conversations import assistant_call, demonstrate, gold_messages
from trainer import envs
from trainer.data import Message, Outcome, Task
from trainer.envs.bfcl import data, suite
from trainer.envs.bfcl.calls import Call, parse_call
from trainer.envs.bfcl.suite import BfclEnvironment, BfclSuite
from trainer.envs.bfcl.world import World
from trainer.errors import EnvironmentBroken, UserError
from trainer.optional_packages import REMEDY

SAY = {"role": "assistant", "content": "Done."}


def all_tasks(bfcl: BfclSuite) -> list[Task]:
    return [task for split in bfcl.splits for task in bfcl.tasks(split)]


def play(task: Task, turns: list[list[Message]]) -> Outcome:
    """Send the messages of each user turn and then an answer."""

    async def episode() -> Outcome:
        environment = BfclEnvironment()
        await environment.reset(task)
        for turn in turns:
            for message in [*turn, SAY]:
                await environment.step(message)
        return await environment.outcome()

    return asyncio.run(episode())


def gold(task: Task) -> list[list[Message]]:
    entry = task.data["entry"]
    naming = World(entry)
    return [gold_messages(turn, naming) for turn in entry.gold[: task.data["turns"]]]


def find(bfcl: BfclSuite, name: str) -> Task:
    return next(task for task in all_tasks(bfcl) if task.id == name)


@pytest.fixture(scope="module")
def whole() -> BfclSuite:
    return suite()


@pytest.fixture(scope="module")
def first_turn() -> BfclSuite:
    return suite(categories=["base"], max_user_turns=1)


def test_gold_passes_everywhere(whole: BfclSuite) -> None:
    async def rewards() -> list[float]:
        return [(await demonstrate(task))[2] for task in all_tasks(whole)]

    assert Counter(asyncio.run(rewards())) == {1.0: 800}


def test_nothing_done_fails_wherever_gold_does_something(whole: BfclSuite) -> None:
    for task in all_tasks(whole):
        outcome = play(task, [[] for _ in range(task.data["turns"])])
        assert outcome.reward == (1.0 if task.task_class == "no_action" else 0.0)
        assert outcome.reward == 1.0 or outcome.details["reason"] == "no_call"


def test_nothing_done_passes_where_nothing_can_be_done() -> None:
    tasks = all_tasks(suite(categories=["miss_func"], max_user_turns=1))
    passed = [task for task in tasks if play(task, [[]]).reward]
    assert len(passed) == 94
    assert {task.task_class for task in passed} == {"no_action"}


def test_a_stray_write_fails_at_the_turn_in_which_it_happens(whole: BfclSuite) -> None:
    task = find(whole, "multi_turn_base_0")
    turns = gold(task)
    turns[1].append(assistant_call(Call("touch", {"file_name": "stray.txt"})))
    outcome = play(task, turns)
    assert outcome.reward == 0.0
    assert outcome.details["failed_turn"] == 1
    assert outcome.details["attributes"] == ["GorillaFileSystem.root"]


def test_a_harmless_read_passes(whole: BfclSuite) -> None:
    task = find(whole, "multi_turn_base_0")
    turns = gold(task)
    turns[1].insert(0, assistant_call(Call("pwd")))
    assert play(task, turns).reward == 1.0


def test_a_missing_result_fails(whole: BfclSuite) -> None:
    task = find(whole, "multi_turn_base_0")
    turns = gold(task)
    turns[1] = [turns[1][0], assistant_call(Call("pwd"))]  # no grep: the state is right, the result is not
    assert play(task, turns).details == {
        "category": "base",
        "turns": 4,
        "failed_turn": 1,
        "reason": "result",
        "missing": 1,
    }


def test_an_unfinished_episode_fails(whole: BfclSuite) -> None:
    task = find(whole, "multi_turn_base_0")
    outcome = play(task, gold(task)[:2])
    assert (outcome.reward, outcome.details["reason"], outcome.details["failed_turn"]) == (0.0, "unfinished", 2)


def test_mistakes_come_back_as_observations(first_turn: BfclSuite) -> None:
    async def replies() -> list[str]:
        environment = BfclEnvironment()
        await environment.reset(find(first_turn, "multi_turn_base_0"))
        calls: list[tuple[str, Any]] = [
            ("no_such_tool", "{}"),
            ("_load_scenario", "{}"),
            ("__class__", "{}"),
            ("cd", '{"path": "x"}'),
            ("cd", '{"folder": "nowhere"}'),
            ("cd", "not json"),
            ("cd", "[1]"),
        ]
        message = {"role": "assistant", "tool_calls": [{"function": {"name": n, "arguments": a}} for n, a in calls]}
        new, done = await environment.step(message)
        assert not done
        return [m["content"] for m in new]

    answers = asyncio.run(replies())
    assert len(answers) == 7
    assert all("error" in json.loads(text) for text in answers)


def test_endless_work_is_refused() -> None:
    entry = next(e for e in data.entries("base") if "MathAPI" in e.classes)
    assert "at most" in World(entry).call(Call("power", {"base": 9, "exponent": 10**9}))
    assert "at most" in World(entry).call(Call("square_root", {"number": 2, "precision": 10**9}))


def test_worlds_share_nothing(first_turn: BfclSuite) -> None:
    entry = find(first_turn, "multi_turn_base_0").data["entry"]
    before = json.dumps(entry.initial_config)
    one, other = World(entry), World(entry)
    one.call(Call("mkdir", {"dir_name": "new"}))
    assert "new" in one.call(Call("ls"))
    assert "new" not in other.call(Call("ls"))
    assert json.dumps(entry.initial_config) == before


def test_held_back_functions_are_handed_over(whole: BfclSuite) -> None:
    async def episode() -> tuple[list[str], str]:
        environment = BfclEnvironment()
        _, tools = await environment.reset(find(whole, "multi_turn_miss_func_0"))
        said = ""
        for _ in range(3):
            new, _ = await environment.step(SAY)
            said = new[0]["content"]
        return [tool["function"]["name"] for tool in tools if not tool.get("unlisted")], said

    names, said = asyncio.run(episode())
    assert "sort" not in names  # held back until the fourth turn
    assert "cp" not in names  # excluded for good
    assert "mv" in names
    assert said.startswith("sort(file_name: str)  # ")


def test_splits_keep_a_conversation_together(whole: BfclSuite) -> None:
    assert whole.splits == {"train": 480, "dev": 160, "test": 160}
    homes: dict[str, set[str]] = {}
    worlds: dict[str, set[str]] = {}
    for task in all_tasks(whole):
        homes.setdefault(task.scenario, set()).add(task.split)
        if task.data["entry"].category == "base":
            world = json.dumps(task.data["entry"].initial_config, sort_keys=True)
            worlds.setdefault(world, set()).add(task.split)
    assert len(homes) == 200
    assert all(len(splits) == 1 for splits in [*homes.values(), *worlds.values()])


def test_task_classes_follow_the_gold(first_turn: BfclSuite) -> None:
    classes = Counter(task.task_class for task in all_tasks(first_turn))
    assert set(classes) == {"state_changing", "information"}
    assert min(classes.values()) > 50


def test_literals_are_what_the_user_does_not_say(first_turn: BfclSuite) -> None:
    for task in all_tasks(first_turn):
        for literal in first_turn.answer_literals(task):
            assert literal.lower() not in task.instruction.lower()
    assert any(first_turn.answer_literals(task) for task in all_tasks(first_turn))


def test_options_are_checked() -> None:
    for options, words in [
        ({"category": ["base"]}, "no option 'category'"),
        ({"categories": ["basic"]}, "'basic' is not one of"),
        ({"categories": []}, r"categories: got \[\], needs a list of base, miss_func"),
        ({"categories": 5}, "categories: got 5, needs a list"),
        ({"categories": "base"}, "categories: got 'base', needs a list"),
        ({"categories": [["base"]]}, "is not one of"),
        ({"max_user_turns": 0}, "at least 1"),
        ({"max_user_turns": True}, "at least 1"),
        ({"categories": ["base"], "max_gold_calls": 1}, "no task is left in bfcl's"),
    ]:
        with pytest.raises(UserError, match=words):
            envs.load("bfcl", **options)
    with pytest.raises(UserError, match="no split 'validation'"):
        suite().tasks("validation")


def test_fewer_gold_calls_means_fewer_tasks() -> None:
    tasks = all_tasks(suite(categories=["base"], max_user_turns=1, max_gold_calls=2))
    assert len(tasks) == 159
    assert all(len(task.data["entry"].gold[0]) <= 2 for task in tasks)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps bfcl-eval=="):
        suite()


def test_the_package_has_one_version_everywhere() -> None:
    root, pin = Path(__file__).parents[3], REMEDY["bfcl_eval"].split()[-1]
    for name in ("requirements-bfcl.txt", "Makefile", "docs/bfcl.md"):
        assert set(re.findall(r"bfcl-eval==[\d.]*\d", (root / name).read_text())) <= {pin}


def test_a_broken_world_is_no_failure_of_the_policy(first_turn: BfclSuite) -> None:
    task = find(first_turn, "multi_turn_base_0")
    entry = dataclasses.replace(task.data["entry"], initial_config={"GorillaFileSystem": {"root": 3}})
    with pytest.raises(EnvironmentBroken, match="does not load"):
        World(entry)


@pytest.mark.parametrize("text", ["f(x)", "f(1)(2)", "a.f()", "f(*[1])", "f(**{})", "1", "f(", "f(a=g())", ""])
def test_only_literal_calls_are_read(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_call(text)


def test_calls_are_read() -> None:
    assert parse_call("f(1, b=[2, 'x'], c={'d': None})") == Call("f", {"b": [2, "x"], "c": {"d": None}}, (1,))
