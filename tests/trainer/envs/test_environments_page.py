"""docs/environments.md: its environment runs as printed, and is what `init-env` writes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from trainer.commands import main
from trainer.envs import template

PAGE = (Path(__file__).parents[3] / "docs" / "environments.md").read_text(encoding="utf-8")


def test_the_listing_passes_check_env_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (listing,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    assert len(listing.splitlines()) <= 60 and listing == template.environment()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert main(["init-env", "page_env"]) == 0
    (tmp_path / "page_env.py").write_text(listing)
    assert main(["check-env", "page_env:Suite"]) == 0 and "page_env:Suite is ready" in capsys.readouterr().out
    small = {"max_steps": 2, "groups_per_step": 3, "num_generations": 4, "eval_samples": 1, "eval_on_start": False}
    assert main(["train", "page_env.yaml", *(word for k, v in small.items() for word in (f"--{k}", str(v)))]) == 0
    records = [json.loads(line) for line in (tmp_path / "runs/page_env/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2] and "eval/bills/tgc" in records[-1]
    assert all(record["by_group/frac_mixed"] > 0 and record["credit/mean_weight"] > 1 for record in records)
