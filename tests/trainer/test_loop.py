"""Whole runs of the toy world: the same bits twice, the same bits after a kill, and what a run leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgcd_kernels import CreditConfig
from tests.trainer import toy
from trainer import engines, envs, loop
from trainer.config import Config, EngineConfig, EnvConfig, ModelConfig, WriterConfig
from trainer.data import Group, Task
from trainer.errors import EnvironmentLost, UserError
from trainer.learning import model as policy
from trainer.records import checkpoint
from trainer.references import writers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    toy.model("llama").save_pretrained(path)
    toy.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _parity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(envs.SUITES, "parity", toy.__name__)


def config(folder: Path, output_dir: Path, **fields: Any) -> Config:
    return Config(
        **{
            "output_dir": output_dir,
            "model": ModelConfig(path=str(folder), max_length=200),
            "env": EnvConfig(name="parity", max_turns=3, timeout=10.0),
            "engine": EngineConfig(slots=16),
            "credit": CreditConfig(d_floor=1e-3),
            "num_generations": 4,
            "groups_per_step": 3,
            "max_completion_length": 12,
            "max_steps": 3,
            "eval_steps": 2,
            "save_steps": 1,
            "trace_steps": 2,
            "learning_rate": 1e-3,
            **fields,
        }
    )


def records(run: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock said."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time/", "perf/", "reference/seconds")
    return [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run)
    assert newest is not None
    return load_file(newest / "model.safetensors")


def identical(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_two_runs_are_the_same_bits_and_another_seed_is_not(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        loop.train(config(folder, tmp_path / name, seed=seed))
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert identical(tmp_path / "a", tmp_path / "b")
    assert not identical(tmp_path / "a", tmp_path / "c")
    check_record(records(tmp_path / "a"))
    check_traces(tmp_path / "a")


def check_record(lines: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "eval/parity/tgc" in lines[0]
    for line in lines[1:]:
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["by_group/trained"] == 3
        assert line["credit/invalid"] == 0
        assert line["credit/mean_weight"] > 1
        assert line["rollout/errored"] == 0
        assert line["entropy"] > 0
    assert [line["step"] for line in lines if "eval/parity/tgc" in line] == [0, 2, 3]


def check_traces(run: Path) -> None:
    assert sorted(p.name for p in (run / "rollouts").iterdir()) == ["step_1.jsonl", "step_2.jsonl", "step_3.jsonl"]
    groups = [json.loads(line) for line in (run / "rollouts" / "step_2.jsonl").read_text().splitlines()]
    assert len(groups) == 3
    for sibling in (s for g in groups for s in g["siblings"]):
        lengths = {
            len(sibling[k]) for k in ("pieces", "ids", "generated", "turns", "classes", "logprobs", "d", "W", "span")
        }
        assert len(lengths) == 1
    assert all(g["reference"] for g in groups)


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


def kill_at_step_3(patch: pytest.MonkeyPatch, where: str) -> None:
    """Stop after the optimiser has moved, before the checkpoint, or after it and before the metrics are written."""
    if where != "update":
        method = getattr(loop.Run, where)

        def fail(run: loop.Run, *arguments: Any) -> Any:
            if run.step == 3:
                raise KeyboardInterrupt
            return method(run, *arguments)

        patch.setattr(loop.Run, where, fail)
        return
    learn = loop.Learner.update

    def half(self: Any, groups: Any, step: int, clock: Any) -> Any:
        found = learn(self, groups, step, clock)
        if step == 3:
            raise KeyboardInterrupt
        return found

    patch.setattr(loop.Learner, "update", half)


def test_evaluating_more_often_changes_no_step(folder: Path, tmp_path: Path) -> None:
    loop.train(config(folder, tmp_path / "often", eval_steps=1, max_steps=2))
    loop.train(config(folder, tmp_path / "never", eval_steps=0, max_steps=2, eval_on_start=False))
    assert identical(tmp_path / "often", tmp_path / "never")


def test_arms_without_credit_are_grpo_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    loop.train(config(folder, tmp_path / "grpo", arm="grpo"))
    loop.train(config(folder, tmp_path / "none", writer=WriterConfig(name="none")))
    loop.train(config(folder, tmp_path / "gamma", credit=CreditConfig(d_floor=1e-3, gamma=0.0)))
    loop.train(config(folder, tmp_path / "sgcd"))
    assert identical(tmp_path / "grpo", tmp_path / "none")
    assert identical(tmp_path / "grpo", tmp_path / "gamma")
    assert not identical(tmp_path / "grpo", tmp_path / "sgcd")
    assert not any(k.startswith(("credit/", "reference/")) for line in records(tmp_path / "grpo") for k in line)


@pytest.mark.parametrize("arm", ["grpo", "sgcd"])
def test_overhead_is_told_only_where_there_is_credit(folder: Path, tmp_path: Path, arm: str) -> None:
    loop.train(config(folder, tmp_path, arm=arm, max_steps=1))
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert ("time/sgcd_overhead" in line) == (arm == "sgcd")
    assert line["time/eval"] > 0


def test_direct_sd_runs(folder: Path, tmp_path: Path) -> None:
    loop.train(config(folder, tmp_path / "sd", arm="direct_sd", max_steps=1))
    assert records(tmp_path / "sd")[1]["loss"] > 0


@pytest.mark.parametrize(("failures", "said"), [(3, "step {} is invalid: 3 of 3"), (2, "step {}: 2 of 3"), (1, "")])
def test_a_writer_that_fails_costs_the_references_not_the_run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failures: int,
    said: str,
) -> None:
    """And where most are missing, every step says so."""
    written = writers.ContrastWriter.write

    async def failing(self: Any, groups: list[Group]) -> None:
        await written(self, groups)
        for group in groups[:failures]:
            group.reference, group.reference_info = "", {"writer": self.name, "error": "timeout"}

    monkeypatch.setattr(writers.ContrastWriter, "write", failing)
    loop.train(config(folder, tmp_path / "run", max_steps=2, eval_on_start=False))
    shown = capsys.readouterr().out.replace("\n", " ")
    assert shown.count("have no reference") == (2 if said else 0)
    for step, line in enumerate(records(tmp_path / "run"), 1):
        assert line["reference/supplied"] == pytest.approx(1 - failures / 3) and line["reference/errors"] == failures
        assert line["credit/invalid"] == float(failures == 3)
        assert said.format(step) in shown


def test_what_a_writer_remembers_is_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(writers.NoneWriter):
        calls = 0

        async def write(self, groups: list[Group]) -> None:
            await super().write(groups)
            self.calls += 1

        def state_dict(self) -> dict[str, Any]:
            return {"calls": self.calls}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.calls = state["calls"]

    made: list[Counting] = []
    monkeypatch.setattr(loop.writers, "load", lambda *a: made.append(Counting()) or made[-1])
    for steps in (1, 3):
        loop.train(config(folder, tmp_path, max_steps=steps, eval_on_start=False))
    assert [writer.calls for writer in made] == [1, 3]


def test_a_step_without_mixed_groups_is_taken_and_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(toy.ParityEnvironment, "outcome", all_fail)
    loop.train(config(folder, tmp_path / "run", max_steps=1, max_resample_times=1))
    line = records(tmp_path / "run")[1]
    assert (line["by_group/trained"], line["rollout/resampled"]) == (0, 1)
    assert "no group is mixed" in capsys.readouterr().out


async def all_fail(self: Any) -> Any:
    from trainer.data import Outcome

    return Outcome(0.0)


def test_an_inert_reference_is_shouted_about(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop.train(config(folder, tmp_path / "run", max_steps=1, credit=CreditConfig(d_floor=1e6)))
    assert records(tmp_path / "run")[1]["credit/invalid"] == 1
    assert "every weight is 1" in capsys.readouterr().out


def test_a_run_that_may_not_be_resumed_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    loop.train(config(folder, tmp_path / "run", max_steps=1))
    with pytest.raises(UserError, match="output_dir"):
        loop.train(config(folder, tmp_path / "run", max_steps=1, resume_from_checkpoint=False))


def test_an_unreachable_model_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: .* is not a folder"):
        loop.train(config(tmp_path / "nowhere", tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        loop.train(config(tmp_path / "empty", tmp_path / "run"))
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"has a config\.json and no weights"):
        loop.train(config(tmp_path / "empty", tmp_path / "run"))
    (tmp_path / "empty" / "model.safetensors").touch()
    with pytest.raises(UserError, match="cannot load"):
        loop.train(config(tmp_path / "empty", tmp_path / "run"))


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "garbage"])
def test_weights_that_do_not_fit_their_config_are_one_line(folder: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state, name = load_file(file), "model.norm.weight"
    match kind:
        case "missing":
            del state[name]
        case "unknown":
            state["vision.weight"] = torch.zeros(2)
        case "shape":
            state[name] = torch.zeros(2)
    save_file(state, file, metadata={"format": "pt"})
    if kind == "garbage":
        file.write_bytes(bytes(100))
    said = {"missing": name, "unknown": r"vision\.weight", "shape": r"norm\.weight as \[2\]", "garbage": "cannot load"}
    with pytest.raises(UserError, match=rf"model\.path: .*{said[kind]}"):
        loop.train(config(tmp_path / "model", tmp_path / "run"))


def test_a_tied_head_need_not_be_stored(tmp_path: Path) -> None:
    model = toy.model()
    model.save_pretrained(tmp_path)
    toy.tokenizer().save_pretrained(tmp_path)
    file, tied = tmp_path / "model.safetensors", tmp_path / "config.json"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if k != "lm_head.weight"}, file, metadata={"format": "pt"})
    tied.write_text(json.dumps({**json.loads(tied.read_text()), "tie_word_embeddings": True}))
    loaded, _, _ = policy.load(ModelConfig(path=str(tmp_path)))
    assert torch.equal(loaded.get_output_embeddings().weight, state["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["sdpaa", "flex"])
def test_an_attention_that_cannot_be_had_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    given = ModelConfig(path=str(folder), max_length=200, attn_implementation=name)
    with pytest.raises(UserError, match=rf"model\.attn_implementation: .*'{name}'"):
        loop.train(config(folder, tmp_path / "run", model=given))


def test_a_model_that_no_engine_can_sample_from_is_one_line(folder: Path, tmp_path: Path) -> None:
    made = config(folder, tmp_path)
    model, _, renderer = policy.load(made.model)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UserError, match=r"model\.path: .*chunked_attention"):
        engines.make(made, model, renderer)


@pytest.mark.parametrize("key", ["train_split", "eval_split"])
def test_a_split_that_is_not_there_is_found_at_the_start(folder: Path, tmp_path: Path, key: str) -> None:
    env = EnvConfig(**{"name": "parity", key: "tset"})
    with pytest.raises(UserError, match=rf"env\.{key}: .*'tset'; its splits are train, dev"):
        loop.train(config(folder, tmp_path / "run", env=env))


def test_a_cut_distribution_is_not_trained_on(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"top_p: got 0\.9"):
        loop.train(config(folder, tmp_path / "run", top_p=0.9))


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
def test_a_world_that_is_gone_stops_the_run_with_a_checkpoint_and_it_goes_on(
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
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """A server that refuses, or a person at the keyboard, in the third step of a run that saves at its end only."""
    plain = loop.Run.collect

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


def test_one_task_that_always_breaks_stops_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset = toy.ParityEnvironment.reset

    async def uneven(self: toy.ParityEnvironment, task: Task) -> Any:
        if task.id == "train-0":
            raise ConnectionError("this one is poisoned")
        return await reset(self, task)

    monkeypatch.setattr(toy.ParityEnvironment, "reset", uneven)
    fields = {"eval_on_start": False, "eval_steps": 0, "dynamic_sample": False, "groups_per_step": 1, "max_steps": 6}
    loop.train(config(folder, tmp_path, **fields))
    assert sorted(line["rollout/errored"] for line in records(tmp_path)) == [0] * 5 + [8]


@pytest.mark.parametrize("spoilt", [2, 3])
def test_updates_without_a_finite_gradient_are_skipped_told_and_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoilt: int
) -> None:
    learn = loop.Learner.update

    def spoil(self: Any, groups: Any, step: int, clock: Any) -> Any:
        found, scored = learn(self, groups, step, clock)
        return {**found, "update/skipped": float(step <= spoilt)}, scored

    monkeypatch.setattr(loop.Learner, "update", spoil)
    made = config(folder, tmp_path, eval_on_start=False, save_steps=0)
    if spoilt < loop.MAX_SKIPPED:
        loop.train(made)
        assert [line["update/skipped"] for line in records(tmp_path)] == [1, 1, 0]
    else:
        with pytest.raises(UserError, match="step 3: the gradient is not finite, 3 times in a row"):
            loop.train(made)
        newest = checkpoint.latest(tmp_path)
        assert newest is not None and newest.name == "step_2", "no step is lost"
    assert capsys.readouterr().out.count("the gradient is not finite") == 2


def test_a_task_that_is_too_long_costs_itself_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = toy.ParitySuite.tasks

    def uneven(self: toy.ParitySuite, split: str) -> list[Task]:
        first, *others = plain(self, split)
        return [replace(first, instruction=" ".join(["w1"] * 300)), *others]

    monkeypatch.setattr(toy.ParitySuite, "tasks", uneven)
    fields = {"eval_on_start": False, "eval_steps": 0, "dynamic_sample": False, "groups_per_step": 6}
    loop.train(config(folder, tmp_path / "run", max_steps=2, **fields))
    assert [line["rollout/too_long"] for line in records(tmp_path / "run")] == [1, 1]
    assert capsys.readouterr().out.count("is left out") == 1
    tight = ModelConfig(path=str(folder), max_length=5)
    with pytest.raises(UserError, match=r"model\.max_length: 5 tokens"):
        loop.train(config(folder, tmp_path / "tight", model=tight, max_completion_length=4, **fields))
