"""The examples run as they are, and credit does something in them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def output_of(example: str, folder: Path = EXAMPLES.parent) -> str:
    command = [sys.executable, "-W", "error::RuntimeWarning", str(EXAMPLES / example)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(after: str, text: str) -> list[float]:
    return [float(x) for x in re.findall(rf"{after} ([0-9.e-]+)", text)]


def test_plain_pytorch() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    weights = numbers("mean W", output_of("plain_pytorch.py"))
    assert len(weights) == 3 and all(w > 1 for w in weights)


def test_trl_sgcd(tmp_path: Path) -> None:
    for package in ("trl", "datasets"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    said = output_of("trl_sgcd.py", tmp_path)
    weights, referenced = numbers("mean W", said), numbers("referenced", said)
    assert len(weights) == 3 and all(w > 1 for w in weights)
    assert any(share > 0 for share in referenced)
    rewards = numbers("reward", said)
    assert any(0 < reward < 1 for reward in rewards), "no group was mixed, so no reference was written"


def test_distill_gkd() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    divergences = numbers("JSD", output_of("distill_gkd.py"))
    assert len(divergences) == 10 and divergences[-1] < 0.7 * divergences[0]
