"""What a run is said to need, against what small runs use; and hours from measurements alone."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import toy
from trainer import checkpoint, envs, footprint, loop, needs, sampling
from trainer.config import Config


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
    assert needs.measured(made) is None
    loop.train(made)
    facts = footprint.facts(made)
    parts = {p.name: p.size for p in needs.disk(made, facts)}
    newest = checkpoint.latest(made.output_dir)
    assert newest is not None
    weights = sum((newest / name).stat().st_size for name in ("model.safetensors", "state/state.pt"))
    assert parts["checkpoints"] / 3 == pytest.approx(weights, rel=0.2)
    lines = [json.loads(x) for x in (made.output_dir / "rollouts" / "step_4.jsonl").read_text().splitlines()]
    tokens = sum(len(s["ids"]) for line in lines for s in line["siblings"])
    assert 0 < sum(f.stat().st_size for f in (made.output_dir / "rollouts").iterdir()) < parts["traces"]
    assert tokens < made.groups_per_step * made.num_generations * needs.longest(made)
    found = needs.measured(made)
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
    assert f"{needs.evaluations(made)} evaluations" in needs.hours(made, found)[1]
    played = sum(k == "eval/parity/tgc" for line in records for k in line)
    assert played == needs.evaluations(made) == 3  # at the start, after 2 and after 4


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_bound_of_rollouts_is_what_sampling_can_do(rounds: int, folder: Path, tmp_path: Path) -> None:
    made = config(folder, tmp_path, max_resample_times=rounds)
    groups = [2 * made.groups_per_step, *[sampling.tasks_for(made.groups_per_step, 0.0)] * rounds]
    assert needs.sampled(made)[1] == made.max_steps * made.num_generations * sum(groups)
    still = config(folder, tmp_path, dynamic_sample=False)
    assert needs.sampled(still) == (4 * 3 * 4, 4 * 3 * 4)


def test_tokens_of_others(folder: Path, tmp_path: Path) -> None:
    writer = {"name": "openai", "max_prompt_chars": 3000, "max_tokens": 100}
    (asked,) = needs.llm_tokens(config(folder, tmp_path, writer=writer), 0)
    assert asked.count == 4 * 3 * (1000 + 100)
    assert needs.llm_tokens(config(folder, tmp_path, writer=writer, arm="grpo"), 0) == []
    (cut,) = needs.llm_tokens(config(folder, tmp_path, writer={**writer, "token_budget": 5000}), 0)
    assert cut.count == 5000 and cut.how.endswith("cut by token_budget")
    options = {"user_base_url": "http://a/v1", "user_model": "m"}
    env = {"name": "tau3_airline", "max_turns": 3, "max_response_tokens": 100, "options": options}
    (customer,) = needs.llm_tokens(config(folder, tmp_path, env=env, arm="grpo", max_resample_times=0), 5)
    conversations = 2 * 4 * 3 * 4 + 3 * 5 * 2
    assert customer.count == conversations * 4 * (needs.SCENARIO + 50)


def test_hours_are_measured_or_unknown(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "BENCHED", tmp_path)
    with (tmp_path / "train_x.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["task", "provider", "status", "seconds_per_step", "device"])
        rows.writerow(["workday", "ours-sgcd", "ok", "6.0", "some machine"])
    embedded = Config(output_dir=tmp_path / "new", max_steps=1200)
    found = needs.measured(embedded)
    assert found is not None
    assert needs.hours(embedded, found)[0] == "2 h"
    assert "some machine, train_x.csv" in needs.hours(embedded, found)[1]
    assert needs.measured(config(folder, tmp_path / "new")) is None, "another model was not measured"
    assert needs.measured(Config(output_dir=tmp_path / "new", arm="direct_sd")) is None
    facts = footprint.facts(config(folder, tmp_path))
    made = config(folder, tmp_path / "new", engine={"name": "vllm", "urls": ["http://a:1"]})
    lines = needs.report(made, facts, footprint.memory(made, facts), 3)
    assert any(line.split()[:2] == ["time", "unknown"] for line in lines)
    assert any("a vLLM server's device" in line for line in lines)
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
