"""`check` passes a config that works, and names what does not without giving up on the rest."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3_5TextConfig

from tests.trainer import toy
from tests.trainer.stub_endpoint import completion
from trainer import envs
from trainer.commands import main
from trainer.config import Config
from trainer.preflight import check, config_file
from trainer.preflight.checks import CHECKS
from trainer.preflight.probe import Probe

PAPER = Path(__file__).parents[3] / "configs" / "paper"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    toy.model().save_pretrained(path)
    toy.tokenizer().save_pretrained(path)
    return path


def config(folder: Path, out: Path, **changes: Any) -> Config:
    return Config.model_validate(
        {"output_dir": out, "model": {"path": str(folder), "max_length": 500}, "max_completion_length": 16, **changes}
    )


def attempt(name: str, probe: Probe) -> tuple[str, str]:
    mark, lines = check.attempt(CHECKS[name], probe)
    return mark, "\n".join(lines)


def rows(config: Config) -> dict[str, tuple[str, str]]:
    probe = Probe(config)
    return {name: attempt(name, probe) for name in CHECKS}


def test_a_config_that_works_passes_every_check(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.check(config(folder, tmp_path))
    shown = capsys.readouterr().out
    assert "ready to train" in shown
    assert "FAIL" not in shown and "skip" not in shown
    assert re.search(r"the trainer's device +\S+ [GM]iB  at its fullest moment", shown)
    assert "activations with model.gradient_checkpointing" in shown
    assert list(tmp_path.iterdir()) == [], "a check leaves nothing behind"


def test_one_failure_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = rows(config(tmp_path / "gone", tmp_path, writer={"name": "openai"}, env={"eval_split": "tset"}))
    assert found["model"][0] == "FAIL" and "model.path" in found["model"][1]
    assert (
        found["environment"][0] == "FAIL" and "no tasks in 'tset'; its splits are train, dev" in found["environment"][1]
    )
    assert found["writer"][0] == "FAIL" and "OPENAI_API_KEY" in found["writer"][1]
    assert found["renderer"][0] == found["scoring"][0] == "skip"
    assert found["versions"][0] == found["backends"][0] == "ok"


@pytest.mark.parametrize(("worlds", "slots", "warned"), [(7, 64, True), (8, 64, False), (3, 4, True), (4, 4, False)])
def test_fewer_worlds_than_rollouts_are_warned_of(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    worlds: int,
    slots: int,
    warned: bool,
) -> None:
    """Two groups of four can play at once, if the engine has the slots; a suite may have room for fewer."""
    monkeypatch.setitem(envs.SUITES, "parity", toy.__name__)
    monkeypatch.setattr(toy.ParitySuite, "worlds", worlds, raising=False)
    few = {"env": {"name": "parity"}, "engine": {"slots": slots}, "groups_per_step": 2, "num_generations": 4}
    assert check.check(config(folder, tmp_path, **few)), "a warning is no mistake"
    shown = capsys.readouterr().out
    line = f"env.options.worlds: {worlds}, but {min(slots, 8)} rollouts could play at once; others queue"
    assert (line in shown) == warned
    assert (re.search(r"^warn +environment", shown, re.MULTILINE) is not None) == warned


def test_a_prompt_without_room_is_named(folder: Path, tmp_path: Path) -> None:
    found = rows(config(folder, tmp_path, model={"path": str(folder), "max_length": 4}, max_completion_length=2))
    assert found["renderer"][0] == "FAIL" and found["renderer"][1].startswith("model.max_length: 4")


def test_a_cut_distribution_is_not_ready_to_train(folder: Path, tmp_path: Path) -> None:
    mark, text = rows(config(folder, tmp_path, top_p=0.9))["scoring"]
    assert mark == "FAIL" and text.startswith("top_p: got 0.9, training needs 1")


def test_a_run_directory_of_another_config_is_named(folder: Path, tmp_path: Path) -> None:
    config_file.claim(config(folder, tmp_path, seed=1))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    found = rows(config(folder, tmp_path, seed=2))
    assert found["run directory"][0] == "FAIL" and "seed is 1 there and 2 here" in found["run directory"][1]


class Endpoint(BaseHTTPRequestHandler):
    """Knows one key; answers as OpenAI-compatible servers do."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == "Bearer right"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(b'{"data": []}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(completion("ready"))

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("key", "mark", "text"),
    [("right", "ok", "answers (HTTP 200)"), ("wrong", "FAIL", "refuses the key in $OPENAI_API_KEY")],
)
def test_the_writers_endpoint_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, key: str, mark: str, text: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    probe = Probe(config(folder, tmp_path, writer={"name": "openai", "base_url": endpoint}))
    probe.suite = toy.ParitySuite()
    found = attempt("writer", probe)
    assert found[0] == mark and text in found[1]
    assert key not in found[1].split()


def test_an_endpoint_that_lists_models_but_answers_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    def refuse(self: Endpoint) -> None:
        self.send_response(400)
        self.end_headers()
        self.wfile.write(b'{"error": "no chat template for Bearer the-right-key"}')

    monkeypatch.setattr(Endpoint, "do_POST", refuse)
    monkeypatch.setenv("OPENAI_API_KEY", "the-right-key")
    monkeypatch.setattr(Endpoint, "do_GET", Busy.do_GET)
    found = attempt(
        "writer", Probe(config(folder, tmp_path, writer={"name": "openai", "base_url": endpoint, "model": "that"}))
    )
    assert found[0] == "FAIL" and "no chat template" in found[1] and "the-right-key" not in found[1]


def test_an_endpoint_that_is_not_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    probe = Probe(config(folder, tmp_path, writer={"name": "openai", "base_url": "http://127.0.0.1:9/v1"}))
    probe.suite = toy.ParitySuite()
    mark, text = attempt("writer", probe)
    assert mark == "FAIL" and text.endswith(
        "does not answer (ConnectError); start it, as in: vllm serve gpt-5-mini --port 9"
    )


class Busy(Endpoint):
    """Takes any key, and has two models."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "this"}, {"id": "that"}]}')


@pytest.mark.parametrize(("model", "mark"), [("that", "ok"), ("other", "FAIL")])
def test_a_model_that_the_endpoint_has_not_is_named(folder: Path, tmp_path: Path, model: str, mark: str) -> None:
    server = HTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    found = attempt(
        "writer", Probe(config(folder, tmp_path, writer={"name": "openai", "base_url": url, "model": model}))
    )
    server.shutdown()
    server.server_close()
    assert found[0] == mark
    if mark == "FAIL":
        assert found[1].endswith("has no model 'other'; it has this, that")


def test_a_probe_that_breaks_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*arguments: Any) -> Any:
        assert list(tmp_path.glob(".check-*")), "a case in which nothing could be left behind"
        raise RuntimeError("no memory")

    def engine(config: Config, model: Any, renderer: Any) -> None:
        (config.output_dir / "vllm.log").write_text("starts")

    monkeypatch.setattr("trainer.engines.make", engine)
    monkeypatch.setattr("trainer.rollout.siblings.run_group", broken)
    mark, text = rows(config(folder, tmp_path / "run"))["scoring"]
    assert (mark, text) == ("FAIL", "RuntimeError: no memory")
    assert not list(tmp_path.iterdir())


def test_everything_missing_is_reported_at_once_one_per_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's config on a machine that has nothing: keys, model, venv, data, servers, endpoint; and exit code 2."""
    for name in ("OPENAI_API_KEY", "APPWORLD_ROOT"):
        monkeypatch.delenv(name, raising=False)
    changes = {
        "env.max_turn": "3",
        "max_steps": "ten",
        "output_dir": str(tmp_path / "run"),
        "model.path": str(tmp_path / "gone"),
        "env.options.python": str(tmp_path / "no" / "bin" / "python"),
        "engine.urls": "[http://127.0.0.1:9]",
        "writer.base_url": "http://127.0.0.1:9/v1",
    }
    words = [word for key, value in changes.items() for word in (f"--{key}", value)]
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["check", str(PAPER / "appworld_sgcd.yaml"), *words]) == 2
    lines = [line[4:].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    served = "--generation-config vllm" + ("" if torch.cuda.is_available() else " --block-size 32")
    wanted = [
        r"config +command line: unknown key 'env.max_turn'; did you mean 'env.max_turns'\?",
        r"config +command line: max_steps: got 'ten', needs a valid integer",
        r"model +model.path: .*gone is not a folder; run: hf download Qwen/Qwen3.5-4B --local-dir models/Qwen3.5-4B",
        r"environment +env.name: appworld needs a Python of its own.*; run: make appworld",
        r"environment +env.name: appworld needs its data and APPWORLD_ROOT is not set; run: .* export APPWORLD_ROOT=.*",
        rf"engine +engine.urls: http://127.0.0.1:9 does not answer.*VLLM_SERVER_DEV_MODE=1 .*{served}",
        r"writer +writer.base_url: http://127.0.0.1:9/v1 does not answer \(ConnectError\); start it, .*vllm serve .*",
    ]
    assert len(lines) == len(wanted)
    for line, pattern in zip(lines, wanted):
        assert re.fullmatch(pattern, line), line


def test_a_mistake_of_the_whole_config_is_reported_with_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("modle: {}\nmax_completion_length: 2000\n")
    assert main(["check", str(file)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "unknown key 'modle'" in told[0] and "max_completion_length: got 2000" in told[1]


def test_what_does_not_fit_the_device_is_said_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the 4 B model is there but its config.json."""
    Qwen3_5TextConfig(hidden_size=2560, intermediate_size=9216, tie_word_embeddings=True).save_pretrained(tmp_path)
    monkeypatch.setattr("trainer.preflight.memory_footprint.device", lambda: ("a card", 80 * 2**30))
    found = rows(config(tmp_path, tmp_path / "run", model={"path": str(tmp_path), "max_length": 32_768}))
    remedy = "give a Hugging Face model folder on this machine: --model.path FOLDER"
    assert found["memory"][0] == "FAIL"
    assert re.search(r"needs \d+\.\d GiB at the fullest moment, a card has 80.0 GiB\. .*no FSDP", found["memory"][1])
    assert found["model"] == (
        "FAIL",
        f"model.path: {tmp_path} has a config.json and no weights; {remedy}",
    )
    (tmp_path / "model.safetensors").touch()
    found = rows(config(tmp_path, tmp_path / "run", model={"path": str(tmp_path), "max_length": 32_768}))
    assert found["model"] == ("skip", "'memory' must pass first")
