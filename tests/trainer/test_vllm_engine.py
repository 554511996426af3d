"""The vLLM engine against server processes that answer as vLLM does and fail in every way they can.

The true server is met by `make test-vllm`; what it answers is what the stub imitates.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import multiprocessing
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import toy, vllm_stub
from trainer import check, checkpoint, configfile, envs, loop
from trainer.config import Config, EngineConfig, EnvConfig, ModelConfig
from trainer.engines import vllm_launch
from trainer.engines.vllm import VLLMEngine
from trainer.engines.vllm_server import write_weights
from trainer.types import Completion, EngineLost, EnvironmentBroken, Sampling, UserError

FORK = multiprocessing.get_context("fork")  # a process of its own, without minutes of imports on a busy machine
PROMPT = [1, 9, 10, 11, 12]
DRAW = Sampling(max_tokens=6)


class Process:
    """One stub server, on a port that it keeps when it is started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.start()

    def start(self) -> None:
        self.process = FORK.Process(target=vllm_stub.serve, args=(str(self.folder), self.port), daemon=True)
        self.process.start()

    def wait(self) -> None:
        for _ in range(600):
            try:
                if httpx.get(self.url + "/health").is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)
        raise AssertionError("the stub did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def alive(self) -> None:
        if not self.process.is_alive():
            self.start()
        self.wait()
        self.fault("", 0)

    def fault(self, kind: str, times: int = 1_000) -> None:
        httpx.post(self.url + "/fault", json={"kind": kind, "times": times})

    def seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = httpx.get(self.url + "/seen").json()
        return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the servers start with: other weights than any test trains."""
    path = tmp_path_factory.mktemp("model")
    toy.model(seed=99).save_pretrained(path)
    toy.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def processes(folder: Path) -> Iterator[list[Process]]:
    made = [Process(folder), Process(folder)]
    yield made
    for process in made:
        process.kill()


@pytest.fixture
def servers(processes: list[Process]) -> list[Process]:
    """Both, alive and well."""
    for process in processes:
        process.alive()
    return processes


def engine(servers: list[Process], tmp_path: Path, model: Any = None, **options: Any) -> VLLMEngine:
    defaults = {
        "stop_ids": toy.renderer().stop_ids,
        "max_length": 200,
        "timeout": 60.0,
        "pause": 0.01,
        "max_retries": 2,
    }
    urls = [s.url for s in servers]
    return VLLMEngine(model or toy.model(), urls=urls, folder=tmp_path / "weights", **{**defaults, **options})


def draw(eng: VLLMEngine, n: int = 8) -> list[Completion]:
    return asyncio.run(eng.generate(PROMPT, n, DRAW))


def drift(model: Any, completions: list[Completion], prompt: list[int] = PROMPT) -> float:
    """How far the engine's log-probs are from the model's."""
    worst = 0.0
    for c in completions:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + c.ids])).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(c.ids)[:, None])[:, 0]
        worst = max(worst, float((own - torch.tensor(c.logprobs)).abs().max()))
    return worst


def test_tokens_come_from_the_weights_that_were_loaded_last(servers: list[Process], tmp_path: Path) -> None:
    first, second = toy.model(seed=0), toy.model(seed=1)
    eng = engine(servers, tmp_path, first)
    before = [len(s.seen()["seen"]) for s in servers]
    completions = draw(eng)
    assert drift(first, completions) < 1e-4 < 0.1 < drift(second, completions)
    assert [len(s.seen()["seen"]) - b for s, b in zip(servers, before)] == [4, 4], "servers are taken in turn"
    eng.load_weights(second)
    assert drift(second, draw(eng)) < 1e-4
    for c in completions:
        assert (c.finish == "stop") == (c.ids[-1] in eng.stop_ids)
        assert len(c.ids) == 6 or c.finish == "stop"


def test_one_seed_draws_the_same_and_another_does_not(servers: list[Process], tmp_path: Path) -> None:
    draws = [draw(engine(servers, tmp_path, seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len({tuple(c.ids) for c in draws[0]}) > 1, "siblings differ"


@pytest.mark.parametrize(
    "fault",
    [
        *("die", "http_500", "http_429", "not_json", "drop", "wrong_version", "mixed", "lost_logprob", "aborted"),
        *("nan", "empty", "no_dev_mode"),
    ],
)
def test_what_one_server_spoils_the_other_gives(servers: list[Process], tmp_path: Path, fault: str) -> None:
    eng = engine(servers, tmp_path)
    wanted = draw(engine(servers, tmp_path))
    asyncio.run(eng.generate(PROMPT, 1, Sampling(max_tokens=1)))
    eng.generator.manual_seed(0)
    servers[1].fault(fault)
    assert draw(eng) == wanted, "the same draw, from the same weights"
    assert eng.servers[1].version == "" and eng.servers[0].version == eng.version


def test_a_passing_fault_costs_nothing_but_a_try(servers: list[Process], tmp_path: Path) -> None:
    eng, wanted = engine(servers, tmp_path), draw(engine(servers, tmp_path))
    for server in servers:
        server.fault("http_500", 1)
    assert draw(eng) == wanted


def test_a_server_that_hangs_is_left_out(servers: list[Process], tmp_path: Path) -> None:
    eng, wanted = engine(servers, tmp_path, timeout=5.0), draw(engine(servers, tmp_path))
    servers[1].fault("hang")
    assert draw(eng) == wanted
    assert [s.version == eng.version for s in eng.servers] == [True, False]


def test_a_server_that_answers_others_and_then_hangs_is_left_out(servers: list[Process], tmp_path: Path) -> None:
    """Of two requests it answers one after the other was sent: no reason to take the other for slow."""
    eng, wanted = engine(servers, tmp_path, timeout=5.0), draw(engine(servers, tmp_path), 4)
    servers[1].fault("hang", 1)

    async def hang_later() -> list[Completion]:
        drawn = asyncio.ensure_future(eng.generate(PROMPT, 4, DRAW))
        await asyncio.sleep(2.5)
        await asyncio.to_thread(servers[1].fault, "hang")
        return await drawn

    before = len(servers[1].seen()["seen"])
    assert asyncio.run(hang_later()) == wanted
    assert len(servers[1].seen()["seen"]) == before + 1, "it did answer one"
    assert [s.version == eng.version for s in eng.servers] == [True, False]


def test_a_server_that_is_restarted_is_waited_for(servers: list[Process], tmp_path: Path) -> None:
    """It is away for longer than all pauses between the tries together."""
    eng, wanted = engine(servers[:1], tmp_path, max_retries=1), draw(engine(servers, tmp_path))
    eng.generator.manual_seed(0)
    servers[0].kill()

    async def come_back() -> list[Completion]:
        drawn = asyncio.ensure_future(eng.generate(PROMPT, 8, DRAW))
        await asyncio.sleep(1.0)
        servers[0].start()
        return await drawn

    assert asyncio.run(come_back()) == wanted


def test_servers_that_stay_away_are_not_waited_for_longer_than_a_request(
    servers: list[Process], tmp_path: Path
) -> None:
    eng = engine(servers[:1], tmp_path, timeout=1.0)
    servers[0].kill()
    begun = time.monotonic()
    with pytest.raises(EngineLost, match=f"no server was there for 1 s: {servers[0].url}"):
        draw(eng)
    assert time.monotonic() - begun < 100


def test_a_cancelled_caller_leaves_no_writer_behind(
    servers: list[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writers in one folder would mix two sets of weights."""
    eng, writing, most = engine(servers, tmp_path), [0], [0]

    def slow(model: Any, folder: Path) -> None:
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        time.sleep(0.5)
        write_weights(model, folder)
        writing[0] -= 1

    monkeypatch.setattr("trainer.engines.vllm.write_weights", slow)

    async def give_up() -> list[Completion]:
        first = asyncio.ensure_future(eng.generate(PROMPT, 2, DRAW))
        await asyncio.sleep(0.1)
        first.cancel()
        return await eng.generate(PROMPT, 2, DRAW)

    assert drift(eng.model, asyncio.run(give_up())) < 1e-4
    assert most == [1]


def test_servers_sleep_at_level_one_and_wake_for_new_weights(servers: list[Process], tmp_path: Path) -> None:
    """Also for those of another run: one that was killed while its servers slept."""
    eng = engine(servers[:1], tmp_path)
    draw(eng)
    told = len(servers[0].seen()["told"])
    eng.sleep()
    eng.wake()
    draw(eng)
    eng.sleep()
    model = toy.model(seed=6)
    assert drift(model, draw(engine(servers[:1], tmp_path, model))) < 1e-4
    assert servers[0].seen()["told"][told:] == ["/sleep?level=1", "/wake_up"] * 2


def test_a_straggler_is_dropped_not_scored(servers: list[Process], tmp_path: Path) -> None:
    """One slow request while its server answers others: an episode's loss, not the server's."""
    eng = engine(servers[:1], tmp_path, timeout=4.0)
    draw(eng, 1)
    servers[0].fault("slow", 1)

    async def both() -> list[Any]:
        slow = asyncio.ensure_future(eng.generate(PROMPT, 1, DRAW))
        await asyncio.sleep(0.3)
        return await asyncio.gather(slow, eng.generate(PROMPT, 1, DRAW), return_exceptions=True)

    slow, quick = asyncio.run(both())
    assert isinstance(slow, EnvironmentBroken) and "engine.timeout = 4 s" in str(slow)
    assert len(quick) == 1
    assert eng.servers[0].version == eng.version, "the server is well"


def test_a_server_with_a_queue_is_not_taken_for_one_that_hangs(
    servers: list[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token that it is asked for waits behind others, which are answered meanwhile."""
    eng = engine(servers[:1], tmp_path, timeout=4.0, max_retries=0)
    draw(eng, 1)
    servers[0].fault("slow", 2)  # the turn, and the token

    async def both() -> list[Any]:
        slow = asyncio.ensure_future(eng.generate(PROMPT, 1, DRAW))
        await asyncio.sleep(6.0)
        return await asyncio.gather(slow, eng.generate(PROMPT, 1, DRAW), return_exceptions=True)

    slow, quick = asyncio.run(both())
    assert isinstance(slow, EnvironmentBroken)
    assert len(quick) == 1
    assert eng.servers[0].version == eng.version


def test_a_server_that_was_restarted_is_not_believed_until_it_has_the_weights(
    servers: list[Process], tmp_path: Path
) -> None:
    model = toy.model(seed=3)
    eng = engine(servers[:1], tmp_path, model)
    draw(eng, 1)
    servers[0].kill()
    servers[0].start()
    servers[0].wait()
    assert drift(model, draw(eng)) < 1e-4
    labels = [s["label"] for s in servers[0].seen()["seen"]]
    assert labels == ["default"] * 8 + [eng.version] * 8, "the first eight were refused"
    assert servers[0].seen()["loads"] == 1, "eight requests, one reload"


@pytest.mark.parametrize("fault", ["load_500", "cache_held", "label_lost"])
def test_a_server_that_does_not_acknowledge_is_left_out(servers: list[Process], tmp_path: Path, fault: str) -> None:
    model = toy.model(seed=4)
    eng = engine(servers, tmp_path, model)
    servers[0].fault(fault)
    assert drift(model, draw(eng)) < 1e-4
    assert [s.version == eng.version for s in eng.servers] == [False, True]
    servers[0].fault("", 0)
    eng.load_weights(model)
    draw(eng)
    assert all(s.version == eng.version for s in eng.servers), "the next weights bring it back"
    for server in servers:
        server.fault(fault)
    eng.load_weights(model)
    with pytest.raises(EngineLost, match=f"{servers[0].url}: /.*{servers[1].url}: /.*3 tries"):
        draw(eng)


def test_weights_do_not_change_under_a_rollout(servers: list[Process], tmp_path: Path) -> None:
    eng = engine(servers, tmp_path)

    async def meddle() -> None:
        running = asyncio.ensure_future(eng.generate(PROMPT, 2, DRAW))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="two policies"):
            eng.load_weights(toy.model(seed=5))
        await running

    asyncio.run(meddle())
    eng.load_weights(toy.model(seed=5))


def test_a_request_that_no_server_would_take_is_not_tried_again(servers: list[Process], tmp_path: Path) -> None:
    eng = engine(servers, tmp_path)
    draw(eng, 1)
    for server in servers:
        server.fault("refuse")
    with pytest.raises(UserError, match=r"refuses.*400.*longer than max_model_len") as caught:
        draw(eng)
    assert not isinstance(caught.value, EngineLost)


def test_a_tied_head_is_served_as_its_own(tmp_path: Path) -> None:
    """vLLM on a CPU would keep the head's old copy: the folder must hold both tensors, and say that they are two."""
    model = toy.model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    write_weights(model, tmp_path / "w")
    stored = load_file(tmp_path / "w" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored["lm_head.weight"], model.get_input_embeddings().weight)
    assert json.loads((tmp_path / "w" / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings is True, "the trainer's own model is still tied"


def test_no_request_is_made_without_room(tmp_path: Path) -> None:
    eng = VLLMEngine(toy.model(), urls=["http://127.0.0.1:9"], folder=tmp_path, stop_ids=[3], max_length=5)
    assert asyncio.run(eng.generate(PROMPT, 2, DRAW)) == [Completion([], [], "length")] * 2
    with pytest.raises(ValueError, match="at least one"):
        asyncio.run(eng.generate([], 1, DRAW))


# -- a run ------------------------------------------------------------------------------------------------------------


def config(folder: Path, out: Path, urls: list[str], **fields: Any) -> Config:
    return Config(
        **{
            "output_dir": out,
            "model": ModelConfig(path=str(folder), max_length=200),
            "env": EnvConfig(name="parity", max_turns=3, timeout=60.0),
            "engine": EngineConfig(name="vllm", urls=urls, timeout=60.0, max_retries=1),
            "arm": "grpo",
            "num_generations": 4,
            "groups_per_step": 2,
            "max_completion_length": 12,
            "max_steps": 2,
            "eval_on_start": False,
            "eval_steps": 2,
            "save_steps": 0,
            "learning_rate": 1e-2,
            **fields,
        }
    )


@pytest.fixture(autouse=True)
def _parity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(envs.SUITES, "parity", toy.__name__)


def test_a_run_whose_servers_die_stops_with_a_checkpoint_and_goes_on(
    servers: list[Process], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(folder, tmp_path / "run", [s.url for s in servers])
    collect = loop.Run.collect

    async def doomed(run: loop.Run, logger: Any) -> Any:
        if run.step == 1:
            run.engine.timeout = 3.0
            for server in servers:
                server.fault("die")
        return await collect(run, logger)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "collect", doomed)
        with pytest.raises(
            EngineLost, match=r"no server was there for 3 s.*VLLM_SERVER_DEV_MODE=1 .*--enable-scale-out"
        ):
            loop.train(made)
    newest = checkpoint.latest(made.output_dir)
    assert newest is not None and newest.name == "step_1"
    for server in servers:
        server.alive()
    loop.train(made)
    whole = config(folder, tmp_path / "whole", [s.url for s in servers])
    loop.train(whole)
    lines = [records(run.output_dir) for run in (made, whole)]
    assert lines[0] == lines[1], "the step that was interrupted never happened"
    assert [line["step"] for line in lines[0]] == [1, 2]
    for line in lines[0]:
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["rollout/errored"] == 0


def test_weights_that_are_acknowledged_and_not_there_are_told(
    servers: list[Process], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers[0].fault("load_lost")
    made = config(folder, tmp_path / "run", [servers[0].url], eval_steps=0, max_steps=3, learning_rate=0.1)
    loop.train(made)
    assert "engine and trainer differ" in capsys.readouterr().out


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Two batches of one draw may differ in their last bits; what was drawn does not.
    kept = ("step", "reward", "completions/", "by_group/", "eval/", "rollout/", "sampling/sampling_logp_difference/max")
    return [{k: round(v, 4) for k, v in line.items() if k.startswith(kept)} for line in lines]


# -- what a person is told --------------------------------------------------------------------------------------------


def test_check_passes_servers_that_fit(servers: list[Process], folder: Path, tmp_path: Path) -> None:
    assert check.check(config(folder, tmp_path / "run", [s.url for s in servers]))
    assert not list(tmp_path.iterdir()), "a check leaves nothing behind"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            {"urls": ["http://127.0.0.1:9"]},
            r"127.0.0.1:9 does not answer \(ConnectError\).*--port 9 .*--enable-scale-out",
        ),
        ({"python": "nowhere/bin/python"}, r"nowhere/bin/python cannot be run.*pip install vllm"),
        ({"python": sys.executable}, r"has no package vllm; .*pip install vllm"),
    ],
)
def test_check_names_what_is_missing(folder: Path, tmp_path: Path, options: dict[str, Any], wanted: str) -> None:
    made = config(folder, tmp_path, ["http://127.0.0.1:9"])
    made = made.model_copy(update={"engine": EngineConfig(name="vllm", **options)})
    with pytest.raises(UserError, match=wanted):
        check.engine(check.Probe(made))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is here")
def test_check_names_a_python_without_vllm_for_colocation(folder: Path, tmp_path: Path) -> None:
    made = config(folder, tmp_path, ["http://a:1"])
    made = made.model_copy(update={"engine": EngineConfig(name="vllm", vllm_mode="colocate")})
    with pytest.raises(UserError, match=r"vllm_mode: colocate: .* has no package vllm; .*sgcd-kernels\[trainer\]"):
        check.engine(check.Probe(made))


def test_check_names_a_server_that_is_too_short(servers: list[Process], folder: Path, tmp_path: Path) -> None:
    made = config(folder, tmp_path, [servers[0].url], model=ModelConfig(path=str(folder), max_length=400))
    with pytest.raises(UserError, match=r"serves 200 tokens, model.max_length is 400"):
        check.engine(check.Probe(made))


@pytest.mark.parametrize(
    "options", [{}, {"urls": ["http://a:1"], "python": "python"}, {"urls": ["localhost:1"]}, {"urls": ["http://u:p@a"]}]
)
def test_a_config_without_servers_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("engine: {name: vllm}\n")
    overrides = [w for k, v in options.items() for w in (f"--engine.{k}", str(v))]
    with pytest.raises(UserError, match="engine"):
        configfile.load(file, overrides)


def test_a_server_that_cannot_start_says_why(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is missing only when it is imported: the process ends, and its last error is in the line."""
    monkeypatch.setattr(vllm_launch, "check_python", lambda python: "0.32.0")
    made = config(folder, tmp_path, ["http://a"])
    made = made.model_copy(update={"engine": EngineConfig(name="vllm", python=sys.executable)})
    with pytest.raises(UserError, match=r"did not start \(.*No module named 'vllm.*vllm.log"):
        vllm_launch.Launched(made, tmp_path / "weights").start()
