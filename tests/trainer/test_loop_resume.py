"""Runs that are stopped or killed, and resumed to the same bits."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer import toy
from tests.trainer.toy_run import config, identical, kill_at_step_3, records
from trainer import loop
from trainer.data import Group, Task
from trainer.errors import EnvironmentLost, UserError
from trainer.records import checkpoint
from trainer.references import writers


@pytest.mark.parametrize("killed_in", ["update", "save", "evaluate"])
def test_a_killed_run_resumes_to_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    whole, cut = config(folder, tmp_path / "whole"), config(folder, tmp_path / "cut")
    loop.train(whole)
    with monkeypatch.context() as patch:
        kill_at_step_3(patch, killed_in)
        with pytest.raises(KeyboardInterrupt):
            loop.train(cut)
    loop.train(cut)
    assert records(whole.output_dir) == records(cut.output_dir)
    assert identical(whole.output_dir, cut.output_dir)


def test_a_run_that_may_not_be_resumed_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    loop.train(config(folder, tmp_path / "run", max_steps=1))
    with pytest.raises(UserError, match="output_dir"):
        loop.train(config(folder, tmp_path / "run", max_steps=1, resume_from_checkpoint=False))


def test_the_checkpoint_is_written_before_the_evaluation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*arguments: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(loop.Run, "evaluate", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        loop.train(config(folder, tmp_path, max_steps=1, eval_on_start=False))
    assert (tmp_path / "checkpoints" / "step_1").is_dir()


def test_records_without_their_checkpoints_are_not_deleted(folder: Path, tmp_path: Path) -> None:
    made = config(folder, tmp_path, max_steps=1, eval_on_start=False)
    loop.train(made)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="checkpoints are gone"):
        loop.train(made)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_records_whose_checkpoints_must_have_been_there_are_kept(folder: Path, tmp_path: Path) -> None:
    """Also where nothing else says that there were any."""
    run = config(folder, tmp_path, max_steps=2, eval_on_start=False)
    loop.train(run)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "newest_checkpoint").unlink()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="checkpoints are gone"):
        loop.train(run)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_an_older_checkpoint_is_not_taken_in_silence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(folder, tmp_path, max_steps=2, eval_on_start=False)
    loop.train(run)
    shutil.rmtree(tmp_path / "checkpoints" / "step_2")
    loop.train(run)
    said = capsys.readouterr().out
    assert f"WARNING: resumes from {tmp_path}/checkpoints/step_1: step_2, which was newer, is not there" in said


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (config(folder, tmp_path / name, save_steps=0) for name in ("whole", "cut"))
    loop.train(whole)
    with monkeypatch.context() as patch:
        kill_at_step_3(patch, "update")
        with pytest.raises(KeyboardInterrupt):
            loop.train(cut)
    loop.train(cut)
    assert records(whole.output_dir) == records(cut.output_dir)


def test_a_finished_run_says_that_there_is_nothing_to_do(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (2, 1):
        loop.train(config(folder, tmp_path, max_steps=steps, eval_on_start=False))
    assert "nothing to do: 2 steps are finished, and max_steps is 1" in capsys.readouterr().out
    assert [line["step"] for line in records(tmp_path)] == [1, 2]


@pytest.mark.parametrize("when", ["sampling", "evaluation"])
def test_a_world_that_is_gone_stops_the_run_with_a_checkpoint_and_it_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """From some moment on every rollout breaks; a run that never met it ends in the same records."""
    gone: list[bool] = []
    reset = toy.ParityEnvironment.reset

    async def doomed(self: toy.ParityEnvironment, task: Task) -> Any:
        if gone:
            raise ConnectionError("http://world:1 is down")
        return await reset(self, task)

    name = {"sampling": "sample_siblings", "evaluation": "evaluate"}[when]
    plain = getattr(loop.Run, name)

    async def fatal(run: loop.Run, *arguments: Any) -> Any:
        if run.step == {"sampling": 1, "evaluation": 2}[when]:
            gone.append(True)
        return await plain(run, *arguments)

    monkeypatch.setattr(toy.ParityEnvironment, "reset", doomed)
    made = config(folder, tmp_path / "run", save_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, name, fatal)
        with pytest.raises(
            EnvironmentLost, match=r"every rollout broke, of \d tasks.*http://world:1 is down"
        ) as caught:
            loop.train(made)
    assert len(caught.value.lines) == 1
    newest = checkpoint.latest(made.output_dir)
    assert newest is not None and newest.name == {"sampling": "step_1", "evaluation": "step_2"}[when]
    gone.clear()
    loop.train(made)
    whole = config(folder, tmp_path / "whole", save_steps=0)
    loop.train(whole)
    assert records(made.output_dir) == records(whole.output_dir)
    assert identical(made.output_dir, whole.output_dir)


@pytest.mark.parametrize("why", ["mistake", "ctrl-c"])
def test_a_run_that_is_stopped_while_it_samples_loses_no_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, why: str
) -> None:
    """A server that refuses, or a person at the keyboard, in the third step of a run that saves at its end only."""
    plain = loop.Run.sample_siblings

    async def stopped(run: loop.Run, *arguments: Any) -> Any:
        found = await plain(run, *arguments)
        if run.step == 2:
            if why == "mistake":
                raise UserError("engine.urls: http://server:1 refuses")
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(10)
        return found

    whole, cut = (config(folder, tmp_path / name, save_steps=0) for name in ("whole", "cut"))
    loop.train(whole)
    given = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, given))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "sample_siblings", stopped)
        for _ in range(2):  # the second time there is nothing new to save
            with pytest.raises(UserError if why == "mistake" else KeyboardInterrupt):
                loop.train(cut)
            newest = checkpoint.latest(cut.output_dir)
            assert newest is not None and newest.name == "step_2"
    loop.train(cut)
    assert records(whole.output_dir) == records(cut.output_dir)
    assert identical(whole.output_dir, cut.output_dir)


@pytest.mark.parametrize("stop", [None, "kill", "signal", "evaluations"])
def test_an_environment_that_draws_from_the_global_generators_is_repeated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str | None
) -> None:
    """From Python's and NumPy's: seeded, saved, undone with a step that is stopped, and left alone by evaluations."""
    outcome = toy.ParityEnvironment.outcome

    async def random_outcome(self: toy.ParityEnvironment) -> Any:
        found = await outcome(self)
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: NPY002
        return dataclasses.replace(found, reward=float(noise > 1.5))

    monkeypatch.setattr(toy.ParityEnvironment, "outcome", random_outcome)
    fields: dict[str, Any] = {"eval_steps": 0, "eval_on_start": False}
    whole, other = config(folder, tmp_path / "whole", **fields), config(folder, tmp_path / "other", **fields)
    loop.train(whole)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    with monkeypatch.context() as patch:
        if stop == "kill":
            kill_at_step_3(patch, "update")
        elif stop == "signal":
            sample = loop.Run.sample_siblings

            async def stopped(run: loop.Run, *arguments: Any) -> Any:
                found = await sample(run, *arguments)
                if run.step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                    await asyncio.sleep(10)
                return found

            patch.setattr(loop.Run, "sample_siblings", stopped)
        elif stop == "evaluations":
            other = other.model_copy(update={"eval_steps": 1, "eval_on_start": True})
        if stop in ("kill", "signal"):
            with pytest.raises(KeyboardInterrupt):
                loop.train(other)
    random.seed(6), np.random.seed(6), torch.manual_seed(6)  # noqa: NPY002
    loop.train(other)
    assert identical(whole.output_dir, other.output_dir)


def test_what_the_writer_spent_in_a_step_that_is_undone_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each stop and start would give some of its budget back."""
    spent = [0]

    class Spender(writers.NoneWriter):
        def state_dict(self) -> dict[str, Any]:
            return {"spent": spent[0]}

        async def write(self, groups: list[Group]) -> None:
            await super().write(groups)
            spent[0] += 7
            if spent[0] > 7:
                raise UserError("the endpoint is gone")

    monkeypatch.setattr(writers, "load", lambda *_: Spender())
    made = config(folder, tmp_path, arm="sgcd", save_steps=1, eval_on_start=False, eval_steps=0)
    with pytest.raises(UserError, match="endpoint is gone"):
        loop.train(made)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == "step_1"
    state = torch.load(newest / "state" / "state.pt", weights_only=True)
    assert state["extra"]["writer"] == {"spent": 14}
