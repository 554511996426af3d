"""What a run has recorded beside its checkpoints, and how a resumed run makes that end where it starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trainer import files
from trainer.errors import UserError
from trainer.records.checkpoint_folder import step_of

METRICS = "metrics.jsonl"
TRACES = "rollouts"


def recorded(output_dir: Path) -> bool:
    """Whether a run left metrics or traces here."""
    metrics = output_dir / METRICS
    return (metrics.exists() and metrics.stat().st_size > 0) or any(traces(output_dir))


def traces(output_dir: Path) -> list[Path]:
    """The traced steps' files by rising step."""
    paths = [output_dir / TRACES / name for name in files.names(output_dir / TRACES)]
    found = [path for path in paths if path.suffix == ".jsonl" and step_of(Path(path.stem)) is not None]
    return sorted(found, key=_step_of_trace)


def _step_of_trace(path: Path) -> int:
    step = step_of(Path(path.stem))
    assert step is not None
    return step


def keep_newest(output_dir: Path, limit: int) -> None:
    """Remove the oldest traces, so that `limit` are left."""
    for path in traces(output_dir)[:-limit]:
        path.unlink()


def rewind(output_dir: Path, step: int) -> float:
    """Make the records end at `step`: later metrics and traces belong to steps that will happen again.

    Metrics are cut behind the last line that is of `step` or earlier; a line before it that cannot be read stays as it
    is. Give the step of that line, -1 if there is none.
    """
    end, last = _end_of(output_dir / METRICS, step)
    if end is not None:
        with files.naming(output_dir / METRICS), (output_dir / METRICS).open("r+b") as out:
            if out.seek(0, os.SEEK_END) > end:
                out.truncate(end)
                os.fsync(out.fileno())
    for path in traces(output_dir):
        if _step_of_trace(path) > step:
            path.unlink()
    return last


def _end_of(metrics: Path, step: int) -> tuple[int | None, float]:
    """Where the last line of `step` or earlier ends, None for no file, and the step of that line."""
    end, last, position = 0, -1.0, 0
    try:
        with files.naming(metrics), metrics.open("rb") as lines:
            for line in lines:
                position += len(line)
                this = _step_of_line(line)
                if this is not None and last < this <= step:
                    end, last = position, this
    except FileNotFoundError:
        return None, last
    except IsADirectoryError:
        raise UserError(f"output_dir: {metrics} is a folder; move it away, or choose another --output_dir") from None
    return end, last


def _step_of_line(line: bytes) -> float | None:
    """The step of one line, None if a kill cut it short or it is damaged."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
