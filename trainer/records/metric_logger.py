"""Where metrics go: metrics.jsonl (the record), the console (a line per step), on request tensorboard and wandb."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer import files
from trainer.console import VisibleConsole
from trainer.optional_packages import need
from trainer.records import run_records

# label on the console -> metric, in the order they are shown
LINE = {
    "reward": "reward",
    "mixed": "by_group/frac_mixed",
    "W": "credit/mean_weight",
    "KL": "credit/mean_divergence",
    "H": "entropy",
    "len": "completions/mean_length",
}


class Sink(Protocol):
    """Somewhere metrics are sent besides the record."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class MetricLogger:
    """One object per step in `output_dir/metrics.jsonl`, one line per step on the console, a progress bar below it.

    Give everything that is known of a step in one `log` call; steps must rise. A value that is not finite is written
    as null. On a terminal the bar is live; elsewhere only the lines are printed.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        report_to: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        console: VisibleConsole | None = None,
    ) -> None:
        self._sinks = [_SINKS[name](output_dir, config or {}, start_step) for name in report_to]
        self._path = output_dir / run_records.METRICS
        if self._path.exists():
            files.check_regular(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._console = console or VisibleConsole(highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bar = self._progress.add_task("train", total=total_steps, completed=start_step)
        self._total = total_steps
        self._last_step: int | None = None
        self._last_time = time.perf_counter()
        self._progress.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step; it is on disk when this returns."""
        assert self._last_step is None or step > self._last_step, f"step {step} was logged after {self._last_step}"
        record = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        with files.naming(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # the next step's checkpoint must not outlive the metrics of this one
        for sink in self._sinks:
            sink.log(step, metrics)
        self._print(step, metrics)
        self._last_step = step

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A second bar for something long inside a step: `with logger.track("evaluate", n) as advance: advance(1)`."""
        bar = self._progress.add_task(description, total=total)
        try:
            yield lambda n: self._progress.update(bar, advance=n)
        finally:
            self._progress.remove_task(bar)

    def note(self, text: str) -> None:
        """Print a line that is no metric: a warning, where a checkpoint went."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
        with files.naming(self._path):
            self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _print(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        shown = [f"{label} {_short(metrics[name])}" for label, name in LINE.items() if name in metrics]
        shown += [f"{n.removeprefix('eval/')} {_short(v)}" for n, v in metrics.items() if _is_headline(n)]
        self._console.print(
            f"step {step}/{self._total}  {'  '.join(shown)}  {seconds:.1f} s", markup=False, soft_wrap=True
        )
        self._progress.update(self._bar, completed=step)


def _is_headline(name: str) -> bool:
    return name.startswith("eval/") and name.count("/") == 2 and name.rsplit("/", 1)[1] in ("tgc", "sgc", "refuser")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


class _TensorBoard:
    def __init__(self, output_dir: Path, config: Mapping[str, Any], start_step: int) -> None:
        need("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, output_dir: Path, config: Mapping[str, Any], start_step: int) -> None:
        wandb = need("wandb")
        remembered = output_dir / "wandb_id.txt"
        run_id = remembered.read_text().strip() if remembered.exists() and start_step else wandb.util.generate_id()
        self._run = wandb.init(project="sgcd", id=run_id, resume="allow", dir=str(output_dir), config=dict(config))
        files.write(remembered, run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[str, Callable[[Path, Mapping[str, Any], int], Sink]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
