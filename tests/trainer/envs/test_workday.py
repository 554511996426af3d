"""The embedded world: tools, tasks, verifier and labels."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys

import pytest

from scripts.check_workday import check_split
from trainer.data import Message, Task
from trainer.envs.workday import suite
from trainer.envs.workday import tasks as catalogue
from trainer.envs.workday.errands import initial_state, plan
from trainer.envs.workday.gold import follow, label, passes, solve
from trainer.envs.workday.world import SPECS, act, build, schemas
from trainer.errors import UserError

ALL_TASKS = [task for split in catalogue.SPLITS for task in catalogue.tasks(split)]


def call(name: str, /, **arguments: object) -> Message:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def play(task: Task, messages: list[Message]) -> tuple[float, str]:
    async def episode() -> tuple[float, str]:
        environment = suite().make()
        await environment.reset(task)
        for message in messages:
            await environment.step(message)
        outcome = await environment.outcome()
        return outcome.reward, outcome.details["label"]

    return asyncio.run(episode())


def gold_messages(task: Task) -> list[Message]:
    gold = solve(task.data)
    calls = [call(step.call.name, **step.call.arguments) for step in gold.steps]
    return [*calls, {"role": "assistant", "content": gold.answer}]


@pytest.mark.parametrize("split", list(catalogue.SPLITS))
def test_every_task_tells_gold_from_nothing_done_and_near_misses(split: str) -> None:
    counts, wrong = check_split(split)
    assert wrong == []
    assert counts["gold: passed"] == catalogue.SPLITS[split]
    assert counts["check skipped: failed"] > 20
    assert counts["argument changed: failed"] > 200
    assert counts["wrong write first: failed"] > 200


def test_gold_passes_through_the_environment_itself() -> None:
    for task in catalogue.tasks("dev"):
        assert play(task, gold_messages(task)) == (1.0, "passed")


def test_splits_have_the_promised_sizes_and_share_no_task() -> None:
    assert [len(catalogue.tasks(split)) for split in catalogue.SPLITS] == [90, 57, 168, 417]
    worlds = [(task.instruction, task.data["seed"]) for task in ALL_TASKS]
    assert len(set(worlds)) == len(worlds)
    assert len({task.id for task in ALL_TASKS}) == 732


def test_a_scenario_is_one_kind_of_work_under_three_conditions() -> None:
    for split in catalogue.SPLITS:
        for index in range(catalogue.SPLITS[split] // 3):
            three = catalogue.scenario(split, index)
            assert len({tuple(part.template for part in task.data["parts"]) for task in three}) == 1
            assert len({task.data["parts"][-1].condition for task in three}) == 3


def test_challenge_has_only_chains_that_occur_nowhere_else() -> None:
    def chains(*splits: str) -> set[tuple[str, ...]]:
        return {tuple(p.template for p in t.data["parts"]) for s in splits for t in catalogue.tasks(s)}

    warm = {tuple(p.template for p in t.data["parts"]) for i in range(2000) for t in catalogue.scenario("warm0", i)}
    assert not chains("test_challenge") & (chains("train", "dev", "test_normal") | warm)
    assert min(len(chain) for chain in chains("test_challenge")) == 2


def test_no_action_tasks_are_few() -> None:
    for split, size in catalogue.SPLITS.items():
        assert sum(task.task_class == "no_action" for task in catalogue.tasks(split)) <= 0.15 * size


def test_tasks_are_the_same_in_another_process() -> None:
    code = (
        "from trainer.envs.workday.tasks import tasks;print([(x.instruction, x.data['seed']) for x in tasks('train')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str([(x.instruction, x.data["seed"]) for x in catalogue.tasks("train")])


def test_damage_that_the_state_no_longer_shows_fails() -> None:
    task = next(t for t in ALL_TASKS if any(c.name == "files_delete" for c in solve(t.data).writes))
    file = next(c.arguments["file"] for c in solve(task.data).writes if c.name == "files_delete")
    done = gold_messages(task)
    assert play(task, done)[0] == 1.0
    assert play(task, [call("files_share", file=file, to="team"), *done]) == (0.0, "stray_write:files_share")


def test_an_episode_that_never_ends_in_words_is_not_done() -> None:
    for task in catalogue.tasks("train"):
        assert play(task, gold_messages(task)[:-1]) == (0.0, "unfinished")


def test_the_instruction_names_no_check() -> None:
    for task in ALL_TASKS:
        assert not set(task.instruction.split()) & (
            set(SPECS) | {"blocked", "paid", "away", "deputy", "limit", "locked"}
        )


def test_schemas_are_openai_tools() -> None:
    tools = schemas()
    assert len(tools) >= 20
    for tool in tools:
        parameters = tool["function"]["parameters"]
        assert tool["type"] == "function"
        assert set(parameters["required"]) == set(parameters["properties"])


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("mail_read", {}, "unknown tool mail_read"),
        ("mail_find", {}, "mail_find needs sender"),
        ("mail_find", {"sender": "nobody"}, "not found"),
        ("mail_find", {"sender": 3}, "sender must be a word"),
        ("wallet_pay", {"to": "ada", "amount": "9"}, "amount must be a number"),
        ("wallet_pay", {"to": "ada", "amount": True}, "amount must be a number"),
        ("wallet_limit", {"day": "mon"}, "wallet_limit needs nothing"),
    ],
)
def test_a_wrong_call_is_an_observation_and_changes_nothing(
    name: str, arguments: dict[str, object], problem: str
) -> None:
    state = build(random.Random(0), ["ada", "ben"], ["audit"])
    before = json.dumps(state)
    assert act(state, name, arguments) == {"error": problem}
    assert json.dumps(state) == before


def test_no_tool_crashes_on_any_argument() -> None:
    values = ["ada", "nobody", "", 3, -1, None, [], {}, 1.5, True]
    rng = random.Random(0)
    for _ in range(5_000):
        state = build(rng, ["ada", "ben", "eva"], ["audit", "logo"])
        name = rng.choice(list(SPECS))
        assert isinstance(act(state, name, {key: rng.choice(values) for key in SPECS[name].parameters}), dict)


def test_labels_name_what_went_wrong() -> None:
    task = next(
        t
        for i in range(500)
        for t in catalogue.scenario("warm9", i)
        if [(p.template, p.condition) for p in t.data["parts"]] == [("pay_invoice", 0)]
    )
    gold, state = solve(task.data), initial_state(task.data)
    steps, _ = follow(plan(task.data), state, lambda step: False)
    made = [(s.call.name, s.call.arguments) for s in steps]
    assert label(gold, made) == "missing_check:contacts_get"
    right = [(s.call.name, s.call.arguments) for s in gold.steps]
    assert label(gold, right[:-1]) == "wrong_branch:mail_send"
    assert label(gold, [*right[:-1], ("mail_send", {"to": "ada", "subject": "fraud"})]) == "wrong_argument:mail_send"
    assert label(gold, [*right, ("calendar_cancel", {"person": "ada"})]) == "stray_write:calendar_cancel"
    assert label(gold, right) == "wrong_answer"


def test_skipping_every_check_fails_where_a_condition_holds() -> None:
    for task in catalogue.tasks("test_normal"):
        state = initial_state(task.data)
        steps, answer = follow(plan(task.data), state, lambda step: False)
        gold = solve(task.data)
        if passes(task.data, gold, state, [step.made for step in steps], answer):
            assert not any(step.decisive for step in gold.steps)
        assert all(step.call.kind != "check" for step in steps)


def test_the_refuser_passes_no_action_tasks_only() -> None:
    for task in ALL_TASKS:
        reward, _ = play(task, [suite().refusal()])
        assert reward == float(task.task_class == "no_action")


def test_an_information_task_must_be_answered_and_nothing_else_touched() -> None:
    task = next(t for t in catalogue.tasks("dev") if t.task_class == "information" and len(t.data["parts"]) == 1)
    done = gold_messages(task)
    assert play(task, done)[0] == 1.0
    assert play(task, done[:-1]) == (0.0, "unfinished")
    assert play(task, [*done[:-1], {"role": "assistant", "content": "answer sorry"}]) == (0.0, "wrong_answer")
    assert play(task, [call("mail_send", to="team", subject="hello"), *done]) == (0.0, "stray_write:mail_send")
    assert suite().answer_literals(task) == [solve(task.data).answer.split()[-1]]


def test_nothing_of_the_task_data_reaches_the_policy() -> None:
    async def prompt(task: Task) -> str:
        messages, tools = await suite().make().reset(task)
        return json.dumps([messages, tools])

    for task in catalogue.tasks("dev")[:10]:
        text = asyncio.run(prompt(task))
        assert "condition" not in text
        assert str(task.data["seed"]) not in text


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(UserError, match="no split 'training'; there are train, dev"):
        suite().tasks("training")
