"""The report script: pieces, what it resumes, what it refuses; with a stand-in for Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_report.sh"
STAND_IN = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *"-m bench run"*after*) [ -e "$FIXED" ] || exit 3 ;; esac
cat >/dev/null </dev/null
"""


def report(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    env = {**os.environ, "OUT": str(tmp_path / "out"), "PY": str(python), "DEVICE": "cpu"}
    env |= {"CALLS": str(tmp_path / "calls"), "FIXED": str(tmp_path / "fixed")}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True, check=False)


def states(tmp_path: Path) -> dict[str, str]:
    lines = report(tmp_path, "list").stdout.splitlines()
    return {line.split()[0]: line.split()[1].strip(",") for line in lines}


def test_a_piece_that_fails_does_not_stop_the_others_and_is_tried_again_alone(tmp_path: Path) -> None:
    assert set(states(tmp_path).values()) == {"to"}
    first = report(tmp_path)
    assert first.returncode == 1
    found = states(tmp_path)
    assert found.pop("bench_2") == "failed" and set(found.values()) == {"done"}
    assert any("-m bench tune" in c for c in (tmp_path / "calls").read_text().splitlines())
    calls = (tmp_path / "calls").read_text().splitlines()
    assert any("bench run --device cpu" in c and "before" in c for c in calls) and any("bench plot" in c for c in calls)
    (tmp_path / "fixed").touch()
    (tmp_path / "calls").unlink()
    second = report(tmp_path)
    assert second.returncode == 0 and set(states(tmp_path).values()) == {"done"}
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "after" in call, "only what was missing ran again"


def test_an_unknown_piece_is_one_line(tmp_path: Path) -> None:
    done = report(tmp_path, "bench_9")
    assert done.returncode == 2 and done.stderr.startswith("unknown piece 'bench_9'; there are machine tests")
