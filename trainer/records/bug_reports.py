"""`bug_reports.jsonl` of a run: the rollouts that broke by a fault in code, one per line, for the report of the fault.

A line is {"step", "task", "error", "traceback", "prompt_ids", "ids", "text", "messages"}. It holds what the policy and
the environment said: look it over before it is sent anywhere.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.data import BugReport

NAME = "bug_reports.jsonl"
MAX_REPORTS = 100  # in a file: more of them tell nothing new

log = logging.getLogger(__name__)


def append(folder: Path, step: int, bugs: Sequence[BugReport]) -> None:
    """Add reports to the run's file, up to `MAX_REPORTS`. A file that cannot be written is no reason to stop a run."""
    if not bugs:
        return
    path = folder / NAME
    try:
        kept = path.read_bytes().count(b"\n") if path.exists() else 0
        lines = [json.dumps({"step": step, **asdict(bug)}, default=repr) for bug in bugs[: max(0, MAX_REPORTS - kept)]]
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="ascii") as out:
            out.writelines(line + "\n" for line in lines)
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be written: %s", path, error)
