"""What a type checker tells a user: the right call has its types, and the wrong one is seen before it runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each line: a user's, and behind it what mypy --strict must say to it (a kind of error, or a type), or nothing.
LINES = """
from torch import Tensor
from typing_extensions import reveal_type
from sgcd_kernels import FusedLinearSGCDLoss, linear_logprob
from sgcd_kernels.integrations.liger import LigerFusedLinearGRPOLoss as Grpo, LigerFusedLinearSGCDLoss as Sgcd
from sgcd_kernels.integrations.trl import SGCDConfig, SGCDTrainer, Siblings, linear_distillation
from sgcd_kernels.integrations.trl import NoSuchThing  # attr-defined
x = Tensor()
reveal_type(FusedLinearSGCDLoss(loss_type="dapo")(x, x, x, x, x, turn_ids=x))  # tuple[Tensor, dict[str, Tensor]]
FusedLinearSGCDLoss()(x, x, x, x, x, nonsense=1)  # call-arg
FusedLinearSGCDLoss()(x, x, x, x)  # call-arg
FusedLinearSGCDLoss(losstype="dapo")  # call-arg
reveal_type(Grpo(beta=0.0)(x, x, x, x, x))  # tuple[Tensor, tuple[Tensor, ...]]
Grpo(sapo="x")  # call-arg
Grpo()(x, x, x, x, x, teacher_input=x)  # call-arg
reveal_type(Sgcd(beta=0.0)(x, x, x, x, x, teacher_input=x))  # tuple[Tensor, tuple[Tensor, ...]]
Sgcd()(x, x, x, x, x)  # call-arg
Sgcd(sapo="x")  # call-arg
reveal_type(linear_logprob(x, x, x).logp)  # Tensor
""".strip().splitlines()


def test_what_mypy_says_to_each_line(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    program = tmp_path / "users.py"
    program.write_text("\n".join(LINES))
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    said: dict[int, set[str]] = {}
    for found in re.finditer(
        r"^.*users\.py:(\d+): (error: .*\[(.*)\]|note: Revealed type is \"(.*)\")$", done.stdout, re.M
    ):
        said.setdefault(int(found[1]), set()).add(found[3] or re.sub(r"torch\._tensor\.", "", found[4]))
    for number, line in enumerate(LINES, 1):
        expected = line.partition("  # ")[2]
        assert said.get(number, set()) == ({expected} if expected else set()), line
