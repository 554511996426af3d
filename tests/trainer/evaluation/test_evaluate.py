"""The figures of an evaluation are correct, in a real environment with a real engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer import toy
from trainer import envs
from trainer.config import Config
from trainer.data import Message, Outcome, Rollout, Task
from trainer.engines.hf import HFEngine
from trainer.errors import EnvironmentBroken, UserError
from trainer.evaluation import command, estimates, evaluate
from trainer.records import checkpoint


def attempt(task: Task, reward: float) -> Rollout:
    said = [{"role": "assistant", "content": "even"}]
    return Rollout(
        task, [], [], [1], ids=[2], generated=[True], messages=said, reward=reward, success=reward == 1, stop="answer"
    )


def scenario(name: str, n: int = 3) -> list[Task]:
    return [Task(f"{name}_{i}", "toy", "dev", name, "information", "") for i in range(n)]


def summary(rewards: dict[str, Sequence[Sequence[float]]], samples: int = 1) -> dict[str, float]:
    """The figures of scenarios whose tasks had these rewards."""
    tasks = {name: scenario(name, len(of_tasks)) for name, of_tasks in rewards.items()}
    rollouts = [
        attempt(task, reward)
        for name, of_tasks in rewards.items()
        for task, of_task in zip(tasks[name], of_tasks, strict=True)
        for reward in of_task
    ]
    return estimates.summarise([t for ts in tasks.values() for t in ts], rollouts, {}, samples=samples)


def test_one_attempt_counts_tasks_and_whole_scenarios() -> None:
    m = summary({"a": [[1], [1], [1]], "b": [[1], [1], [0]], "c": [[0], [0], [0]]})
    assert m["tgc"] == m["pass@1"] == pytest.approx(5 / 9)
    assert m["sgc"] == pytest.approx(1 / 3)
    assert (m["tasks"], m["scenarios"]) == (9, 3)


def test_a_broken_attempt_is_left_out_and_never_a_failure() -> None:
    m = summary({"a": [[1], [1], []], "b": [[1], [0], [1]]})
    assert m["tgc"] == pytest.approx(4 / 5)
    assert m["sgc"] == 0, "scenario a is not known to be whole, b is not solved"
    assert m["scenarios"] == 1
    assert summary({"a": [[]]}) == {}


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=5), min_size=1, max_size=4))
def test_pass_hat_k_is_the_mean_over_all_choices_of_k_attempts(rewards: list[list[float]]) -> None:
    m = summary({str(i): [r] for i, r in enumerate(rewards)}, samples=3)
    for k in (2, 3):
        by_hand = fmean(fmean(all(c) for c in combinations(r, k)) for r in rewards)
        assert m[f"pass^{k}"] == pytest.approx(by_hand)
        assert m[f"pass^{k}_low"] - 1e-12 <= by_hand <= m[f"pass^{k}_high"] + 1e-12
    assert (m["pass@1_low"], m["pass@1_high"]) == (m["tgc_low"], m["tgc_high"])


def test_pass_hat_leaves_out_tasks_with_too_few_attempts() -> None:
    assert estimates.pass_hat({"a": [1, 1, 0], "b": [1], "c": [1, 1]}, 2) == {"a": 1 / 3, "c": 1.0}


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3), min_size=2, max_size=12))
def test_the_interval_holds_the_estimate_and_is_the_same_each_time(rewards: list[list[float]]) -> None:
    given_rewards = {str(i): [[r] for r in rs] for i, rs in enumerate(rewards)}
    m = summary(given_rewards)
    assert 0 <= m["tgc_low"] <= m["tgc"] + 1e-12
    assert m["tgc"] - 1e-12 <= m["tgc_high"] <= 1
    assert m["sgc_low"] - 1e-12 <= m["sgc"] <= m["sgc_high"] + 1e-12
    torch.rand(3)
    assert summary(given_rewards) == m


def test_the_bootstrap_resamples_scenarios_not_tasks() -> None:
    together = [(3.0, 3.0), (0.0, 3.0)] * 10  # a scenario's tasks succeed or fail together
    apart = [(1.0, 1.0), (0.0, 1.0)] * 30  # the same tasks, each its own scenario
    wide, narrow = estimates.bootstrap(together), estimates.bootstrap(apart)
    assert wide[1] - wide[0] > 1.4 * (narrow[1] - narrow[0])  # sqrt(3) in theory


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        solved = (torch.rand(40, generator=generator) < 0.4).double()
        low, high = estimates.bootstrap([(s, 1.0) for s in solved.tolist()], draws=400)
        hits += low <= 0.4 <= high
    assert 0.88 <= hits / 200 <= 0.99


def engine() -> HFEngine:
    return HFEngine(toy.model(), slots=8, stop_ids=toy.renderer().stop_ids, max_length=96, seed=5)


def config(**changes: object) -> Config:
    small = {"model": {"max_length": 96}, "env": {"max_turns": 3}, "max_completion_length": 12, "eval_samples": 4}
    return Config.model_validate({**small, **changes})


def test_an_evaluation_of_the_toy_world_adds_up_and_disturbs_nothing() -> None:
    players = [engine(), engine()]
    done: list[int] = []
    players[0].generator.manual_seed(99)  # wherever training stood
    before = players[0].generator.get_state()
    first, second = (
        asyncio.run(evaluate.evaluate(p, toy.ParitySuite(), toy.renderer(), config(), advance=done.append))
        for p in players
    )
    assert first.metrics == second.metrics
    assert torch.equal(players[0].generator.get_state(), before)
    assert sum(done) == 6
    assert len(first.rollouts) == 3 * 4
    assert first.metrics["eval/parity/tgc"] == pytest.approx(fmean(r.reward for r in first.rollouts))
    assert 0 < first.metrics["eval/parity/tgc"] < 1, "a case that could not tell right from wrong"
    rates = [fmean(r.reward for r in first.rollouts if r.task.id == f"dev-{i}") for i in range(3)]
    assert first.metrics["eval/parity/sgc"] == pytest.approx(rates[0] * rates[1] * rates[2])
    assert {f"eval/parity/pass^{k}" for k in (2, 3, 4)} <= first.metrics.keys()
    assert first.metrics["eval/parity/errored"] == 0


class Agreeable(toy.ParitySuite):
    def refusal(self) -> Message:
        return {"role": "assistant", "content": "no thanks"}  # two words: what this world wants


class Insistent(toy.ParityEnvironment):
    """A user who asks again, once."""

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        said, _ = await super().step(message)
        return said, self.log.count("step") == 2


def test_the_refuser_refuses_until_the_episode_is_over() -> None:
    class Suite(toy.ParitySuite):
        def make(self) -> toy.ParityEnvironment:
            return Insistent(self.log, self.faults)

    for turns, steps in ((16, 2), (1, 1)):
        suite = Suite()
        asyncio.run(evaluate.refuse(suite, suite.tasks("dev")[:1], timeout=5, max_turns=turns))
        assert suite.log.count("step") == steps


class Graded(toy.ParitySuite):
    """An environment that says how good a rollout was, and not whether it succeeded."""

    def make(self) -> toy.ParityEnvironment:
        return GradedEnvironment(self.log, self.faults)


class GradedEnvironment(toy.ParityEnvironment):
    async def outcome(self) -> Outcome:
        self.log.append("outcome")
        return Outcome(0.2 + 0.1 * (self.log.count("outcome") % 3))  # .2, .3 and .4 in turn


@pytest.mark.parametrize(("threshold", "solved"), [(None, 0.0), (0.2, 1.0), (0.5, 0.0)])
def test_attempts_without_a_verifiers_word_are_judged_alone(threshold: float | None, solved: float) -> None:
    """Not by the other attempts at the task, as siblings are in training; the refuser is judged alike."""
    small = config(env={"max_turns": 1}, eval_samples=4, success_threshold=threshold)
    engine = HFEngine(toy.model(), slots=16, stop_ids=toy.renderer().stop_ids, max_length=480)
    found = asyncio.run(evaluate.evaluate(engine, Graded(), toy.renderer(), small)).metrics
    assert found["eval/parity/tgc"] == solved
    assert found["eval/parity/refuser"] == solved
    assert 0.2 <= found["eval/parity/reward"] <= 0.4


def test_the_refuser_is_graded_by_the_rewards_that_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "paying_rewards.py").write_text("def silence(rollout):\n    return float(len(rollout.messages) == 1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    small = config(env={"max_turns": 1}, success_threshold=1.0, rewards=[{"path": "paying_rewards:silence"}])
    engine = HFEngine(toy.model(), slots=16, stop_ids=toy.renderer().stop_ids, max_length=480)
    found = asyncio.run(evaluate.evaluate(engine, toy.ParitySuite(), toy.renderer(), small)).metrics
    assert found["eval/parity/refuser"] == 1.0


def test_the_refuser_is_really_played() -> None:
    for suite, expected in ((toy.ParitySuite(), 0.0), (Agreeable(), 1.0)):
        paid = asyncio.run(evaluate.refuse(suite, suite.tasks("dev"), timeout=5))
        assert paid == {f"dev-{i}": expected for i in range(3)}
        assert {entry: suite.log.count(entry) for entry in ("reset", "step", "outcome", "close")} == dict.fromkeys(
            ("reset", "step", "outcome", "close"), 3
        )


@pytest.mark.parametrize("fault", [EnvironmentBroken("gone"), ValueError("bug"), 3600.0], ids=["broken", "bug", "hang"])
def test_a_world_that_breaks_under_the_refuser_is_left_out(fault: object) -> None:
    suite = Agreeable(faults=[("step", fault)])
    assert asyncio.run(evaluate.refuse(suite, suite.tasks("dev"), timeout=2.0)) == {"dev-1": 1.0, "dev-2": 1.0}


def test_the_eval_command_loads_a_checkpoint_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = toy.model()
    model.save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()  # another policy than the folder's
    path = checkpoint.save(tmp_path, 3, model=model, optimiser=torch.optim.AdamW(model.parameters()))
    small = config(
        model={"path": str(tmp_path / "model"), "max_length": 480},
        env={"max_turns": 1, "eval_split": "dev"},
        output_dir=tmp_path,
        eval_samples=1,
    )
    start, trained = command.run(small), command.run(small, path)
    assert [r.ids for r in start.rollouts] != [r.ids for r in trained.rollouts]
    assert json.loads((tmp_path / "eval_dev_base.json").read_text())["weights"] == str(tmp_path / "model")
    record = json.loads((tmp_path / "eval_dev_step_3.json").read_text())
    assert record["weights"] == str(path)
    assert len(record["tasks"]) == record["metrics"]["eval/workday/tasks"] == 57
    assert {len(t["rewards"]) for t in record["tasks"].values()} == {1}
    shown = capsys.readouterr().out
    assert "95 % interval" in shown and "refuser" in shown and "eval_dev_step_3.json" in shown


def test_the_record_says_with_which_options_and_each_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with two user simulators: the second record does not take the place of the first."""
    monkeypatch.setitem(envs.SUITES, "parity", toy.__name__)
    monkeypatch.setattr(toy, "suite", toy.ParitySuite)
    toy.model().save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    for tasks in (2, 5, 5):
        env = {"name": "parity", "max_turns": 1, "options": {"tasks": tasks}}
        command.run(config(model={"path": str(tmp_path / "model"), "max_length": 96}, env=env, output_dir=tmp_path))
    written = [json.loads(path.read_text()) for path in tmp_path.glob("eval_dev_base_*.json")]
    assert sorted(record["options"]["tasks"] for record in written) == [2, 5]


class Uneven(toy.ParitySuite):
    """Its first task is longer than the others."""

    def tasks(self, split: str) -> list[Task]:
        first, *others = super().tasks(split)
        return [dataclasses.replace(first, instruction=" ".join(["w1"] * 20)), *others]


def test_a_task_that_is_too_long_is_left_out_and_counted() -> None:
    def figures(length: int) -> dict[str, float]:
        small = config(model={"max_length": length}, max_completion_length=4, eval_samples=1)
        return asyncio.run(evaluate.evaluate(engine(), Uneven(), toy.renderer(), small)).metrics

    found = figures(20)
    assert (found["eval/parity/too_long"], found["eval/parity/tasks"]) == (1, 2)
    with pytest.raises(UserError, match=r"model\.max_length: 5 tokens"):
        figures(5)


def test_an_output_dir_that_is_a_file_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir: .*file cannot be a folder"):
        command.run(config(output_dir=tmp_path / "file", model={"path": "nowhere"}))
