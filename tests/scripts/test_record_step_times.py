"""The measured seconds per step that `check` reads: the newest successful row of each environment and arm."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from scripts.record_step_times import newest_times
from trainer.preflight.run_costs import STEP_TIMES

FIELDS = ["task", "provider", "status", "seconds_per_step", "device", "sha", "date"]
ROWS = {
    "train_a.csv": [
        ["workday", "ours-sgcd", "ok", "6.0", "old machine", "a", "2026-01-31T00:00:00Z"],
        ["workday", "trl-grpo", "ok", "1.0", "old machine", "a", "2026-01-31T00:00:00Z"],
    ],
    "train_b.csv": [
        ["workday", "ours-sgcd", "ok", "3.0", "new machine", "b", "2026-02-28T00:00:00Z"],
        ["workday", "ours-grpo", "failed", "", "new machine", "b", "2026-02-28T00:00:00Z"],
    ],
}


def test_the_newest_successful_row_of_this_trainer_is_recorded(tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        with (tmp_path / name).open("w") as file:
            csv.writer(file).writerows([FIELDS, *rows])
    assert newest_times(tmp_path) == [
        {
            "env": "workday",
            "arm": "sgcd",
            "seconds_per_step": 3.0,
            "device": "new machine",
            "date": "2026-02-28",
            "sha": "b",
        }
    ]


def test_the_recorded_times_cover_the_embedded_runs() -> None:
    recorded = {(row["env"], row["arm"]): row["seconds_per_step"] for row in json.loads(STEP_TIMES.read_text())}
    assert all(recorded["workday", arm] > 0 for arm in ("grpo", "sgcd"))
