"""Result rows, one per case and provider, and their CSV files; the description of the machine.

One file per op, device, day and commit: bench/results/<op>_<device>_<date>_<sha>.csv. Reading needs no torch.
"""

from __future__ import annotations

import csv
import datetime
import functools
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from bench.cases import OPS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
OK = "ok"

# Results that were committed under earlier names of columns and providers.
RENAMED_COLUMNS = {"floor_ratio": "matmul_ratio"}
RENAMED_PROVIDERS = {"gemm": "matmul", "walk": "sweep"}
FORMATS = {
    **dict.fromkeys(("error", "grad_error"), ".1e"),
    **dict.fromkeys(("others", "seconds_per_step"), ".2f"),
    **dict.fromkeys(("rollout_tokens_per_s", "update_tokens_per_s"), ".0f"),
    **dict.fromkeys((f"{stage}_share" for stage in ("rollout", "update", "score", "credit", "reference")), ".3f"),
    "sgcd_overhead": ".3f",
}  # others: four digits


@dataclass
class Row:
    """A measurement; fields that were not measured are None. docs/benchmarks.md explains the columns."""

    op: str = ""
    mode: str = ""
    shape: str = ""
    N: int = 0
    kept: int = 0
    H: int = 0
    V: int = 0
    dtype: str = ""
    provider: str = ""
    status: str = OK
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    repeats: int = 0
    peak_mb: float | None = None
    tflops: float | None = None
    matmul_ratio: float | None = None
    error: float | None = None
    grad_error: float | None = None
    version: str = ""
    device: str = ""
    threads: int = 0
    others: float | None = None  # cores that other programs used meanwhile
    torch: str = ""
    triton: str = ""
    python: str = ""
    sha: str = ""
    date: str = ""  # UTC, ISO 8601

    @property
    def case(self) -> tuple[str, ...]:
        return (self.device, self.op, self.mode, self.shape, str(self.N), self.dtype)

    @property
    def key(self) -> tuple[str, ...]:
        """A later row with the same key replaces this one."""
        return (*self.case, self.provider)

    def path(self, folder: Path = RESULTS) -> Path:
        return folder / f"{self.op}_{slug(self.device)}_{self.date[:10]}_{self.sha}.csv"


@dataclass
class TrainingRow:
    """Means over the measured steps of one trainer on one task (`python -m bench train`)."""

    task: str = ""
    provider: str = ""
    status: str = OK
    steps: int = 0
    seconds_per_step: float | None = None
    rollout_tokens_per_s: float | None = None  # sampled tokens over seconds of rollouts
    update_tokens_per_s: float | None = None  # loss tokens over seconds of updates
    rollout_share: float | None = None  # fraction of a step's time
    update_share: float | None = None
    score_share: float | None = None
    credit_share: float | None = None
    reference_share: float | None = None
    sgcd_overhead: float | None = None  # time of score, credit and reference over that of rollouts and updates
    version: str = ""
    device: str = ""
    threads: int = 0
    others: float | None = None
    torch: str = ""
    transformers: str = ""
    sha: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return (self.device, self.task, self.provider)

    def path(self, folder: Path = RESULTS) -> Path:
        return folder / f"train_{slug(self.device)}_{self.date[:10]}_{self.sha}.csv"


AnyRow = TypeVar("AnyRow", Row, TrainingRow)


def slug(name: str) -> str:
    """A device's name in the form used in file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def columns_of(kind: type[Row] | type[TrainingRow]) -> list[str]:
    return [f.name for f in fields(kind)]


def append(rows: Sequence[Row] | Sequence[TrainingRow], folder: Path = RESULTS) -> None:
    """Append rows to the file of the first one, creating it if needed."""
    path, columns = rows[0].path(folder), columns_of(type(rows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        if new:
            writer.writerow(columns)
        for row in rows:
            writer.writerow(_format(name, getattr(row, name)) for name in columns)


def _format(name: str, value: object) -> str:
    if isinstance(value, float):
        return format(value, FORMATS.get(name, ".4g"))
    return "" if value is None else str(value)


def read(folder: Path = RESULTS) -> list[Row]:
    """The newest row of every case and provider in a folder; files with other columns are ignored."""
    return _read_newest(folder, Row)


def read_training(folder: Path = RESULTS) -> list[TrainingRow]:
    """The newest row of every device, task and trainer in a folder."""
    return _read_newest(folder, TrainingRow)


def _read_newest(folder: Path, kind: type[AnyRow]) -> list[AnyRow]:
    newest: dict[tuple[str, ...], AnyRow] = {}
    for path in sorted(folder.glob("*.csv")):
        for row in _read_file(path, kind):
            if row.key not in newest or newest[row.key].date <= row.date:
                newest[row.key] = row
    return list(newest.values())


def _read_file(path: Path, kind: type[AnyRow]) -> Iterable[AnyRow]:
    with path.open(newline="", encoding="utf-8") as lines:
        reader = csv.reader(lines)
        columns = [RENAMED_COLUMNS.get(name, name) for name in next(reader, [])]
        if columns != columns_of(kind):
            return
        for cells in reader:
            row = kind()
            for name, text in zip(columns, cells):
                setattr(row, name, _parse(getattr(kind, name), text))
            row.provider = RENAMED_PROVIDERS.get(row.provider, row.provider)
            yield row


def _parse(default: str | int | None, text: str) -> str | int | float | None:
    if isinstance(default, str):
        return text
    if isinstance(default, int):
        return int(text or 0)
    return float(text) if text else None


def by_case(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows grouped by case, in the order of the file."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return list(cases.values())


def by_device(rows: Sequence[Row]) -> dict[str, list[Row]]:
    devices: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r.device, OPS.index(r.op), r.mode, r.dtype, r.V, r.N)):
        devices.setdefault(row.device, []).append(row)
    return devices


def newest_devices(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of the GPU and of the CPU that were measured last."""
    devices = by_device(rows)
    order = sorted(devices, key=lambda device: max(r.date for r in devices[device]))
    last = {bool(devices[device][0].threads): device for device in order}
    return {last[kind]: devices[last[kind]] for kind in sorted(last)}


@functools.cache
def device_name(device: str) -> str:
    """A readable name: that of the GPU, or of the processor with its number of cores."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({_instructions()}), {os.cpu_count()} cores"


def _instructions() -> str:
    """The widest vector instruction set: processors of the same name may differ in it."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    order = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "avx512f": "AVX512", "avx2": "AVX2"}
    return next((name for flag, name in order.items() if flag in flags), platform.machine())


def fast_dtypes(device: str) -> tuple[str, ...]:
    """The dtypes worth measuring: bf16 only if the processor has instructions for it; emulated, it is very slow."""
    if device == "cuda":
        return ("bf16",)
    return ("bf16", "fp32") if _instructions() in ("AMX", "AVX512_BF16") else ("fp32",)


@functools.cache
def commit() -> str:
    """The short sha, marked if files of the library, the trainer or the suite differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    sha = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", "sgcd_kernels", "csrc", "trainer", "bench/*.py", "bench/providers")
    return f"{sha}-dirty" if sha and changed else sha or "none"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
