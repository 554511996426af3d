"""A recording is the same twice, and a comparison finds what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts import result_bits
from scripts.result_cases import cases, credit_cases

BITS = {"call | loss": "a", "call | metric kl": "b", "call | gradient of hidden": "c"}


def recording(bits: dict[str, str]) -> dict:
    return {"machine": {"commit": "0", "torch": "2"}, "bits": bits}


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [
        (BITS, 0, "3 of 3 the same"),
        (BITS | {"call | loss": "z"}, 1, "differs: call | loss"),
        ({k: v for k, v in BITS.items() if "loss" not in k}, 1, "missing: call | loss"),
        (BITS | {"call | metric entropy": "d"}, 0, "new: call | metric entropy"),
        ({**BITS, "call | metric k3": "b"}, 0, "new: call | metric k3"),
        (
            {"call | metric k3" if "kl" in k else k: v for k, v in BITS.items()},
            0,
            "renamed: call | metric kl -> metric k3",
        ),
        ({"call | metric k3" if "kl" in k else k: v + "!" for k, v in BITS.items()}, 1, "missing: call | metric kl"),
        (
            {"call | result" if "loss" in k else k: v for k, v in BITS.items()},
            1,
            "missing: call | loss",
        ),  # only a metric may be renamed
    ],
)
def test_compare(after: dict[str, str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert result_bits.compare(recording(BITS), recording(after)) == code
    assert said in capsys.readouterr().out


def test_compare_says_that_machines_differ(capsys: pytest.CaptureFixture[str]) -> None:
    other = {"machine": {"commit": "1", "torch": "3"}, "bits": BITS}
    assert result_bits.compare(recording(BITS), other) == 0
    assert "warning: torch differs" in capsys.readouterr().out


def test_a_hash_is_of_dtype_shape_and_every_bit() -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    others = [x.double(), x.reshape(4), x.t(), -x, x * torch.tensor([[-1.0, 1.0], [1.0, 1.0]])]  # the last: -0.0
    hashes = {result_bits.hash_tensor(y) for y in [x, *others]}
    assert len(hashes) == 6
    assert result_bits.hash_tensor(x.t().contiguous().t()) == result_bits.hash_tensor(x)


def test_records_what_it_is_asked_for() -> None:
    chosen = [(name, call) for name, call in credit_cases() if "fp64, gear, own" in name]
    first, second = (result_bits.record_calls(chosen) for _ in range(2))
    assert first == second
    assert "credit_weights, fp64, gear, own, mask | saliency" in first


def test_names_are_unique() -> None:
    names = [name for name, _ in cases()]
    assert len(names) == len(set(names)) > 500


def test_a_training_run_is_hashed_without_its_times(tmp_path: Path) -> None:
    metrics = {"step": 1, "loss": 0.5, "time/rollout": 3.0, "perf/mfu": 0.1, "reference/seconds": 2.0, "arm": "sgcd"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    assert [key for key, _ in result_bits.hash_metrics(tmp_path)] == [
        "metrics of step 1 | metric step",
        "metrics of step 1 | metric loss",
    ]
