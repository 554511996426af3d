"""Starts runs with faults, and compares what they leave."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.trainer import toy
from tests.trainer.toy_run import CLOCKS, config
from trainer.config import EnvConfig
from trainer.preflight import config_file
from trainer.records import checkpoint, run_records

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

# as in faults.c
READ, CREATE, WRITE, SYNC, RENAME, REMOVE, MKDIR, TRUNCATE = (1 << n for n in range(8))
CHANGES = CREATE | WRITE | SYNC | RENAME | REMOVE | MKDIR | TRUNCATE
COUNT, KILL, FAIL, FAIL_FROM, SIGNAL = range(5)


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th event of `kinds`: `number` is an errno or a signal."""

    mode: int = COUNT
    at: int = 0
    number: int = 0
    kinds: int = CHANGES


NONE = Fault()


@dataclass
class Ended:
    """How commands ended: the exit code of the last one, -N after signal N, and what they said."""

    code: int
    said: str
    events: list[str] = field(default_factory=list)

    def check_lines(self) -> None:
        """Each command that failed has said one line, which does not advise to delete anything."""
        *commands, rest = re.split(r"^\[(\d+)\]\n", self.said, flags=re.MULTILINE)
        for said, code in zip(commands[::2], commands[1::2]):
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            stops = re.findall("^(?:stopped by SIG(?:TERM|HUP)|interrupted): the same command", said, re.MULTILINE)
            assert len(errors) == int(code == "2") and len(stops) == int(int(code) > 128), self.said
            assert not any(word in line for line in errors for word in ("delet", "remov")), errors
        assert not rest and "Traceback" not in self.said, self.said


class Runs:
    """A world of toy runs: the process that forks them, and the folder they live in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        library = root / "faults.so"
        build = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library)]
        subprocess.run([*build, str(HERE / "faults.c")], check=True)
        toy.model("llama").save_pretrained(root / "model")
        toy.tokenizer().save_pretrained(root / "model")
        self.source = root / "chaos.yaml"
        made = config(
            root / "model", root / "run", arm="sgcd", save_total_limit=1, num_generations=3, groups_per_step=2,
            max_completion_length=6, trace_steps=1, trace_total_limit=2, eval_on_start=False, max_resample_times=1,
            env=EnvConfig(name="parity", max_turns=2, timeout=10.0),
        )  # fmt: skip
        self.source.write_text(yaml.safe_dump(config_file.dump(made)))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.chaos.runs"],
            cwd=ROOT,
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self._process.communicate()

    def train(
        self, run: Path, fault: Fault = NONE, *, times: int = 1, writer_fails_at: int = 0, more: Sequence[str] = ()
    ) -> Ended:
        """Give the train command `times` times in one process."""
        command = ["train", str(self.source), "--output_dir", str(run), *more]
        out, log = self.root / "out", self.root / "events"
        request = {
            "commands": [command] * times,
            "out": str(out),
            "writer_fails_at": writer_fails_at,
            "fault": [str(run), fault.mode, fault.at, fault.number, fault.kinds, str(log)],
        }
        assert self._process.stdin and self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return Ended(code, out.read_text(errors="replace"), log.read_text().splitlines())


def left(run: Path) -> dict[str, Any]:
    """What a finished run leaves, as far as it must not depend on what happened on the way."""
    newest = checkpoint.latest(run)
    assert newest is not None
    state = torch.load(newest / "state" / "state.pt", weights_only=True)
    moments = {
        f"{i}/{name}": value.numpy().tobytes()
        for i, each in state["optimiser"]["state"].items()
        for name, value in each.items()
    }
    paths = [path for path in run_records.traces(run) if path.is_file()]  # damage may have made it a folder
    traces = {path.name: [readable(line) for line in path.read_bytes().splitlines()] for path in paths}
    return {
        "checkpoints": sorted(p.name for p in (run / "checkpoints").iterdir() if not p.name.startswith("damaged-")),
        "weights": (newest / "model.safetensors").read_bytes(),
        "moments": moments,
        "order": state["extra"]["order"],
        "engine": state["generators"]["named"]["engine"].numpy().tobytes(),
        "metrics": [readable(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()],
        "traces": traces,
        "page": (run / "view.html").is_file(),
    }


def readable(line: bytes) -> Any:
    """A line of metrics or a trace without what the clock said; one that was damaged as it is."""
    try:
        return {name: v for name, v in json.loads(line).items() if not name.startswith((*CLOCKS, "reference_info"))}
    except ValueError:
        return line


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in a if a[name] != b[name]]


def copy(run: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to, symlinks=True)
    return to
