"""Runs whose rollouts come from servers, and what `check` says of servers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import toy
from tests.trainer.engines.vllm_servers import Process, config, records
from trainer import envs, loop
from trainer.config import EngineConfig, ModelConfig
from trainer.engines import vllm_launch
from trainer.errors import EngineLost, UserError
from trainer.preflight import check, config_file
from trainer.preflight.checks import check_engine
from trainer.preflight.probe import Probe
from trainer.records import checkpoint


@pytest.fixture(autouse=True)
def _parity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(envs.SUITES, "parity", toy.__name__)


def test_a_run_whose_servers_die_stops_with_a_checkpoint_and_resumes(
    servers: list[Process], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(folder, tmp_path / "run", [s.url for s in servers])
    sample = loop.Run.sample_siblings

    async def doomed(run: loop.Run, clock: Any, logger: Any) -> Any:
        if run.step == 1:
            run.engine.timeout = 3.0
            for server in servers:
                server.fault("die")
        return await sample(run, clock, logger)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "sample_siblings", doomed)
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
        check_engine(Probe(made))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is here")
def test_check_names_a_python_without_vllm_for_colocation(folder: Path, tmp_path: Path) -> None:
    made = config(folder, tmp_path, ["http://a:1"])
    made = made.model_copy(update={"engine": EngineConfig(name="vllm", vllm_mode="colocate")})
    with pytest.raises(UserError, match=r"vllm_mode: colocate: .* has no package vllm; .*sgcd-kernels\[trainer\]"):
        check_engine(Probe(made))


def test_check_names_a_server_that_is_too_short(servers: list[Process], folder: Path, tmp_path: Path) -> None:
    made = config(folder, tmp_path, [servers[0].url], model=ModelConfig(path=str(folder), max_length=400))
    with pytest.raises(UserError, match=r"serves 200 tokens, model.max_length is 400"):
        check_engine(Probe(made))


@pytest.mark.parametrize(
    "options", [{}, {"urls": ["http://a:1"], "python": "python"}, {"urls": ["localhost:1"]}, {"urls": ["http://u:p@a"]}]
)
def test_a_config_without_servers_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("engine: {name: vllm}\n")
    overrides = [w for k, v in options.items() for w in (f"--engine.{k}", str(v))]
    with pytest.raises(UserError, match="engine"):
        config_file.load(file, overrides)


def test_a_server_that_cannot_start_says_why(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is missing only when it is imported: the process ends, and its last error is in the line."""
    monkeypatch.setattr(vllm_launch, "check_python", lambda python: "0.32.0")
    made = config(folder, tmp_path, ["http://a"])
    made = made.model_copy(update={"engine": EngineConfig(name="vllm", python=sys.executable)})
    with pytest.raises(UserError, match=r"did not start \(.*No module named 'vllm.*vllm.log"):
        vllm_launch.Launched(made, tmp_path / "weights").start()
