"""What a run is said to need, against what small runs use; and hours from measurements alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import toy
from trainer import envs, loop
from trainer.config import Config
from trainer.preflight import memory_footprint, run_costs
from trainer.records import checkpoint
from trainer.rollout.dynamic_sampling import tasks_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    toy.model().save_pretrained(path)
    toy.tokenizer().save_pretrained(path)
    return path


def config(folder: Path, out: Path, **fields: Any) -> Config:
    base: dict[str, Any] = {
        "output_dir": out,
        "model": {"path": str(folder), "max_length": 200},
        "env": {"name": "parity", "max_turns": 3},
        "num_generations": 4,
        "groups_per_step": 3,
        "max_completion_length": 12,
        "max_steps": 4,
        "save_steps": 1,
        "trace_steps": 1,
        "eval_steps": 2,
    }
    return Config.model_validate({**base, **fields})


def test_a_run_needs_no_more_than_it_was_said_to(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints to within their small files; traces below their bound; hours afterwards from its own steps."""
    monkeypatch.setitem(envs.SUITES, "parity", toy.__name__)
    made = config(folder, tmp_path / "run")
    assert run_costs.measured(made) is None
    loop.train(made)
    facts = memory_footprint.facts(made)
    parts = {p.name: p.size for p in run_costs.disk(made, facts)}
    newest = checkpoint.latest(made.output_dir)
    assert newest is not None
    weights = sum((newest / name).stat().st_size for name in ("model.safetensors", "state/state.pt"))
    assert parts["checkpoints"] / 3 == pytest.approx(weights, rel=0.2)
    lines = [json.loads(x) for x in (made.output_dir / "rollouts" / "step_4.jsonl").read_text().splitlines()]
    tokens = sum(len(s["ids"]) for line in lines for s in line["siblings"])
    assert 0 < sum(f.stat().st_size for f in (made.output_dir / "rollouts").iterdir()) < parts["traces"]
    assert tokens < made.groups_per_step * made.num_generations * run_costs.longest(made)
    found = run_costs.measured(made)
    assert found is not None and found.where == f"4 steps of {made.output_dir}"
    records = [json.loads(line) for line in (made.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert found.seconds == pytest.approx(
        sum(
            sum(r.get(f"time/{s}", 0) for s in ("rollout", "reference", "score", "credit", "update", "report"))
            for r in records
        )
        / 4
    )
    assert found.evaluation is not None
    assert f"{run_costs.evaluations(made)} evaluations" in run_costs.hours(made, found)[1]
    played = sum(k == "eval/parity/tgc" for line in records for k in line)
    assert played == run_costs.evaluations(made) == 3  # at the start, after 2 and after 4


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_bound_of_rollouts_is_what_sampling_can_do(rounds: int, folder: Path, tmp_path: Path) -> None:
    made = config(folder, tmp_path, max_resample_times=rounds)
    groups = [2 * made.groups_per_step, *[tasks_for(made.groups_per_step, 0.0)] * rounds]
    assert run_costs.sampled(made)[1] == made.max_steps * made.num_generations * sum(groups)
    still = config(folder, tmp_path, dynamic_sample=False)
    assert run_costs.sampled(still) == (4 * 3 * 4, 4 * 3 * 4)


def test_tokens_of_other_language_models(folder: Path, tmp_path: Path) -> None:
    writer = {"name": "openai", "max_prompt_chars": 3000, "max_tokens": 100}
    (asked,) = run_costs.llm_tokens(config(folder, tmp_path, writer=writer), 0)
    assert asked.count == 4 * 3 * (1000 + 100)
    assert run_costs.llm_tokens(config(folder, tmp_path, writer=writer, arm="grpo"), 0) == []
    (cut,) = run_costs.llm_tokens(config(folder, tmp_path, writer={**writer, "token_budget": 5000}), 0)
    assert cut.count == 5000 and cut.how.endswith("cut by token_budget")
    options = {"user_base_url": "http://a/v1", "user_model": "m"}
    env = {"name": "tau3_airline", "max_turns": 3, "max_response_tokens": 100, "options": options}
    (simulator,) = run_costs.llm_tokens(config(folder, tmp_path, env=env, arm="grpo", max_resample_times=0), 5)
    conversations = 2 * 4 * 3 * 4 + 3 * 5 * 2
    assert simulator.count == conversations * 4 * (run_costs.SCENARIO + 50)


def test_hours_are_measured_or_unknown(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = {
        "env": "workday",
        "arm": "sgcd",
        "seconds_per_step": 6.0,
        "device": "some machine",
        "date": "2026-01-31",
    }
    monkeypatch.setattr(run_costs, "STEP_TIMES", tmp_path / "step_times.json")
    run_costs.STEP_TIMES.write_text(json.dumps([recorded]))
    embedded = Config(output_dir=tmp_path / "new", max_steps=1200)
    found = run_costs.measured(embedded)
    assert found is not None
    assert run_costs.hours(embedded, found)[0] == "2 h"
    assert "some machine, 2026-01-31" in run_costs.hours(embedded, found)[1]
    assert run_costs.measured(config(folder, tmp_path / "new")) is None, "another model was not measured"
    assert run_costs.measured(Config(output_dir=tmp_path / "new", arm="direct_sd")) is None
    facts = memory_footprint.facts(config(folder, tmp_path))
    made = config(folder, tmp_path / "new", engine={"name": "vllm", "urls": ["http://a:1"]})
    lines = run_costs.report(made, facts, memory_footprint.memory(made, facts), 3)
    assert any(line.split()[:2] == ["time", "unknown"] for line in lines)
    assert any("a vLLM server's device" in line for line in lines)
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
