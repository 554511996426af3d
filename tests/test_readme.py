"""The front page: short, and everything on it exists and runs as it stands."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sgcd_kernels

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPET = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_is_read_in_a_minute() -> None:
    assert len(README.splitlines()) <= 110
    assert all(len(line) <= 130 for line in README.splitlines() if not line.startswith(("|", "![")))
    assert len(re.findall(r"^!\[", README, re.MULTILINE)) == 2
    table = README.split("<!-- bench:summary -->")[1].split("<!-- /bench -->")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 5 and any("**" in row for row in rows), "five rows, a loss among them"


def test_the_snippet_runs_as_pasted(tmp_path: Path) -> None:
    assert len(SNIPPET) == 1 and len(SNIPPET[0].strip().splitlines()) <= 12
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPET[0], encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=None, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(re.fullmatch(r"mean W (\d\.\d\d)\n", done.stdout)[1]) > 1  # type: ignore[index]
    assert "inert" not in done.stderr


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(?:sgcd_kernels\.)?(\w+)\([\w, ]*\)`", README))))
def test_what_is_called_is_a_public_function(name: str) -> None:
    assert callable(getattr(sgcd_kernels, name)) and name in sgcd_kernels.__all__


@pytest.mark.parametrize("name", ["linear_logprob", "linear_divergence", "credit_weights", "linear_policy_loss"])
def test_what_is_named_is_public(name: str) -> None:
    assert f"`{name}`" in README and name in sgcd_kernels.__all__


@pytest.mark.parametrize("line", re.findall(r"`(from [\w.]+ import \w+)`", README))
def test_imports_work(line: str) -> None:
    module, name = re.fullmatch(r"from ([\w.]+) import (\w+)", line).groups()  # type: ignore[union-attr]
    assert callable(getattr(importlib.import_module(module), name))
