"""The shipped weights, and training on the embedded world itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts.warmstart.__main__ import FOLDER
from scripts.warmstart.policy import WarmStart, fingerprint
from trainer import loop
from trainer.preflight.config_file import load

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "workday_sgcd.yaml"
SMALL = [
    "--groups_per_step", "2", "--num_generations", "4", "--max_steps", "3",
    "--eval_steps", "0", "--eval_on_start", "false",
    "--model.path", str(ROOT / FOLDER),
]  # fmt: skip


Run = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def run(folder: Path, *overrides: str) -> Run:
    """Train in `folder`; give every step's metrics without times, and the weights."""
    from safetensors.torch import load_file

    loop.train(load(CONFIG, [*SMALL, "--output_dir", str(folder), *overrides]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "perf/", "reference/seconds")
    kept = [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]
    return kept, load_file(folder / "checkpoints" / "step_3" / "model.safetensors")


def test_the_shipped_weights_belong_to_these_demonstrations() -> None:
    record = json.loads((ROOT / FOLDER / "warmstart.json").read_text())
    assert record["key"] == WarmStart().key(), (
        "run `make warmstart`: words, demonstrations or their numbers have changed"
    )
    assert record["weights"] == fingerprint(ROOT / FOLDER)
    gate = record["gate"]
    assert gate["true_reference"] >= gate["student"] + 0.20
    assert gate["wrong_task"] < gate["student"]
    assert sum(file.stat().st_size for file in (ROOT / FOLDER).iterdir()) < 5_000_000


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("usual"))


def test_one_seed_gives_the_same_metrics_and_weights_bit_by_bit(usual: Run, tmp_path: Path) -> None:
    lines, weights = run(tmp_path)
    assert lines == usual[0]
    assert all(torch.equal(weights[name], usual[1][name]) for name in weights)
    assert len(lines) == 3
    assert all(line["credit/mean_weight"] > 1 for line in lines)


def test_another_seed_gives_other_weights(usual: Run, tmp_path: Path) -> None:
    _, other = run(tmp_path, "--seed", "1")
    assert any(not torch.equal(usual[1][name], other[name]) for name in other)


@pytest.mark.parametrize("arm", ["grpo", "direct_sd"])
def test_the_other_arms_train_too(tmp_path: Path, arm: str) -> None:
    lines, _ = run(tmp_path, "--arm", arm)
    assert all(line["grad_norm"] > 0 for line in lines)
    assert all(("credit/mean_weight" in line) == (arm != "grpo") for line in lines)


def test_a_reference_that_says_nothing_moves_little(usual: Run, tmp_path: Path) -> None:
    shell, _ = run(tmp_path, "--writer.name", "empty_shell")
    for line, true in zip(shell, usual[0]):
        assert line["reference/supplied"] == 1.0
        assert line["credit/mean_divergence"] < 0.25 * true["credit/mean_divergence"]


def test_without_references_sgcd_is_grpo_bit_by_bit(tmp_path: Path) -> None:
    untold, weights = run(tmp_path / "untold", "--writer.name", "none")
    _, plain = run(tmp_path / "plain", "--arm", "grpo")
    assert all(line["reference/supplied"] == 0.0 for line in untold)
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
