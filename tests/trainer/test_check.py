"""`check` passes a config that works, and names what does not without giving up on the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import toy
from trainer import check, configfile
from trainer.config import Config


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


def rows(config: Config) -> dict[str, tuple[str, str]]:
    probe = check.Probe(config)
    return {name: check._attempt(run, probe) for name, run in check.CHECKS.items()}


def test_a_config_that_works_passes_every_check(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.check(config(folder, tmp_path))
    shown = capsys.readouterr().out
    assert "ready to train" in shown
    assert "FAIL" not in shown and "skip" not in shown
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


def test_a_prompt_without_room_is_named(folder: Path, tmp_path: Path) -> None:
    found = rows(config(folder, tmp_path, model={"path": str(folder), "max_length": 4}, max_completion_length=2))
    assert found["renderer"][0] == "FAIL" and found["renderer"][1].startswith("model.max_length: 4")


def test_a_cut_distribution_is_not_ready_to_train(folder: Path, tmp_path: Path) -> None:
    mark, text = rows(config(folder, tmp_path, top_p=0.9))["scoring"]
    assert mark == "FAIL" and text.startswith("top_p: got 0.9, training needs 1")


def test_a_run_directory_of_another_config_is_named(folder: Path, tmp_path: Path) -> None:
    configfile.claim(config(folder, tmp_path, seed=1))
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
    ("key", "mark", "text"), [("right", "ok", "answers (200)"), ("wrong", "FAIL", "refuses the key in $OPENAI_API_KEY")]
)
def test_the_writers_endpoint_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, key: str, mark: str, text: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    probe = check.Probe(config(folder, tmp_path, writer={"name": "openai", "base_url": endpoint}))
    probe.found["environment"] = toy.ParitySuite()
    found = check._attempt(check.writer, probe)
    assert found[0] == mark and text in found[1]
    assert key not in found[1].split()


def test_an_endpoint_that_is_not_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    probe = check.Probe(config(folder, tmp_path, writer={"name": "openai", "base_url": "http://127.0.0.1:9/v1"}))
    probe.found["environment"] = toy.ParitySuite()
    mark, text = check._attempt(check.writer, probe)
    assert mark == "FAIL" and "does not answer (ConnectError)" in text
