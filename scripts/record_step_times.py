"""`python -m scripts.record_step_times`: write what `bench train` measured to trainer/assets/step_times.json.

`check` reads the seconds per step of the embedded policy there: the newest successful row of each environment and arm.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from trainer.preflight.run_costs import STEP_TIMES

RESULTS = Path(__file__).parents[1] / "bench" / "results"
PROVIDER = "ours-"  # of this trainer's rows, followed by the arm


def newest_times(results: Path) -> list[dict[str, Any]]:
    """One record per environment and arm, from the rows of `results`/train_*.csv."""
    newest: dict[tuple[str, str], dict[str, str]] = {}
    for file in results.glob("train_*.csv"):
        with file.open(encoding="utf-8") as rows:
            for row in csv.DictReader(rows):
                key = row["task"], row["provider"].removeprefix(PROVIDER)
                usable = row["provider"].startswith(PROVIDER) and row["status"] == "ok"
                if usable and (key not in newest or newest[key]["date"] < row["date"]):
                    newest[key] = row
    return [
        {
            "env": env,
            "arm": arm,
            "seconds_per_step": float(row["seconds_per_step"]),
            "device": row["device"],
            "date": row["date"][:10],
            "sha": row["sha"],
        }
        for (env, arm), row in sorted(newest.items())
    ]


if __name__ == "__main__":
    STEP_TIMES.write_text(json.dumps(newest_times(RESULTS), indent=1) + "\n", encoding="utf-8")
