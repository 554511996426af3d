"""The examples run as they are, and credit does something in them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_plain_pytorch() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    command = [sys.executable, "-W", "error::RuntimeWarning", str(EXAMPLES / "plain_pytorch.py")]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = [float(x) for x in re.findall(r"mean W ([0-9.]+)", done.stdout)]
    assert len(weights) == 3 and all(w > 1 for w in weights)
