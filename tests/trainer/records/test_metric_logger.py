"""Where metrics go: the record, the console, tensorboard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from trainer.records.metric_logger import MetricLogger


def test_the_record_holds_one_object_per_step(tmp_path: Path) -> None:
    console = Console(file=(tmp_path / "screen.txt").open("w"), width=200)
    with MetricLogger(tmp_path, total_steps=2, console=console) as logger:
        logger.log(1, {"reward": 0.5, "credit/mean_weight": 1.25})
        with logger.track("evaluate", 3) as advance:
            advance(3)
        logger.log(2, {"reward": float("nan"), "eval/toy/tgc": 0.75})
        with pytest.raises(AssertionError):
            logger.log(2, {})
        logger.note("[not markup]")
    console.file.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "reward": 0.5, "credit/mean_weight": 1.25},
        {"step": 2, "reward": None, "eval/toy/tgc": 0.75},
    ]
    screen = (tmp_path / "screen.txt").read_text().splitlines()
    assert len(screen) == 3
    assert "step 1/2" in screen[0] and "reward 0.5" in screen[0] and "W 1.25" in screen[0]
    assert "toy/tgc 0.75" in screen[1]
    assert screen[2] == "[not markup]"


def test_tensorboard_receives_every_scalar(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricLogger(tmp_path, total_steps=1, report_to=["tensorboard"], console=Console(quiet=True)) as logger:
        logger.log(1, {"reward": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5)]
