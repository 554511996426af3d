"""Whole runs of the toy environment: the same bits twice, the arms, and what a run leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sgcd_kernels import CreditConfig
from tests.trainer import toy
from tests.trainer.toy_run import config, identical, records
from trainer import loop
from trainer.chat.compact import CompactRenderer
from trainer.config import ModelConfig, WriterConfig
from trainer.data import BugReport, Group, Task
from trainer.errors import NotFinite, UserError
from trainer.records import bug_reports, checkpoint, rollout_files
from trainer.references import writers
from trainer.text import encodable


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
    of_gamma = {k for line in records(tmp_path / "gamma") for k in line if k.startswith("credit/")}
    assert of_gamma == {"credit/invalid"}  # nothing was scored, so there is nothing to say of a divergence


@pytest.mark.parametrize("arm", ["grpo", "sgcd"])
def test_overhead_is_reported_only_with_credit(folder: Path, tmp_path: Path, arm: str) -> None:
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


def test_a_step_without_mixed_groups_is_taken_and_reported(
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


def test_a_fault_of_our_own_costs_a_rollout_and_is_counted_shown_and_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse, left = CompactRenderer.parse, [3]

    def fail(self: CompactRenderer, ids: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise TypeError("unhashable type: 'list'")
        return parse(self, ids)

    monkeypatch.setattr(CompactRenderer, "parse", fail)
    loop.train(config(folder, tmp_path, eval_on_start=False, max_steps=2))
    assert [line["rollout/bugs"] for line in records(tmp_path)] == [3, 0]
    assert [line["rollout/errored"] for line in records(tmp_path)] == [3, 0]
    assert "step 1: code failed on 3 rollouts" in capsys.readouterr().out
    reports = [json.loads(line) for line in (tmp_path / bug_reports.NAME).read_text().splitlines()]
    assert [report["step"] for report in reports] == [1, 1, 1]
    for report in reports:
        assert "unhashable" in report["error"] and "in fail" in report["traceback"]
        assert report["ids"] and report["text"] == toy.renderer().decode(report["ids"])
    check = tmp_path / "again"
    bug_reports.append(check, 7, [BugReport("t", "e\ud83d", "")] * 150)
    assert len((check / bug_reports.NAME).read_text().splitlines()) == bug_reports.MAX_REPORTS


def test_odd_text_from_outside_can_be_written_and_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lone surrogates in tasks, tools, outputs and references, with traces, checkpoints and a second start."""
    odd = "w1 \ud83d \x00 \u202e"
    tasks, step, reset = toy.ParitySuite.tasks, toy.ParityEnvironment.step, toy.ParityEnvironment.reset

    async def say_odd(self: toy.ParityEnvironment, message: Any) -> Any:
        messages, done = await step(self, message)
        return [{**m, "content": odd} for m in messages], done

    async def show_odd(self: toy.ParityEnvironment, task: Task) -> Any:
        messages, tools = await reset(self, task)
        function = {**tools[0]["function"], "description": odd, "parameters": {"properties": {odd: {"enum": [odd]}}}}
        return messages, [{**tools[0], "function": function}]

    class OddWriter(writers.Stateless):
        name = "odd"

        async def write(self, groups: list[Group]) -> None:
            for group in groups:
                group.reference, group.reference_info = odd, {"writer": self.name}

    monkeypatch.setattr(
        toy.ParitySuite,
        "tasks",
        lambda self, split: [replace(t, instruction=odd, id=t.id + odd) for t in tasks(self, split)],
    )
    monkeypatch.setattr(toy.ParityEnvironment, "step", say_odd)
    monkeypatch.setattr(toy.ParityEnvironment, "reset", show_odd)
    monkeypatch.setattr(writers, "load", lambda *_: OddWriter())
    for steps in (1, 2):
        loop.train(config(folder, tmp_path, eval_on_start=False, max_steps=steps, trace_steps=1))
    traces = [rollout_files.read_step(path) for path in sorted((tmp_path / "rollouts").iterdir())]
    assert len(traces) == 2
    for group in (group for step_ in traces for group in step_):
        assert group["task"]["instruction"] == group["reference"] == encodable(odd)
    assert not (tmp_path / bug_reports.NAME).exists()


def test_an_inert_reference_warns(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop.train(config(folder, tmp_path / "run", max_steps=1, credit=CreditConfig(d_floor=1e6)))
    assert records(tmp_path / "run")[1]["credit/invalid"] == 1
    assert "every weight is 1" in capsys.readouterr().out


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
        with pytest.raises(NotFinite, match="step 3: the gradient is not finite, 3 times in a row"):
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
