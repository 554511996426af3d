"""The rows of a result: one a provider and case, in bench/results/<op>_<device>_<date>_<sha>.csv. Needs no torch."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
OK = "ok"


@dataclass
class Row:
    """What was found, empty where it was not measured. docs/benchmarks.md explains the columns."""

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
    floor_ratio: float | None = None
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
    def key(self) -> tuple[str, ...]:
        """What a later row of the same thing replaces."""
        return (self.device, self.op, self.mode, self.shape, str(self.N), self.dtype, self.provider)

    @property
    def case(self) -> tuple[str, ...]:
        return self.key[:-1]


COLUMNS = [f.name for f in fields(Row)]
DIGITS = {"error": ".1e", "grad_error": ".1e", "others": ".2f"}


def slug(name: str) -> str:
    """A device's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def path_of(row: Row, folder: Path = RESULTS) -> Path:
    return folder / f"{row.op}_{slug(row.device)}_{row.date[:10]}_{row.sha}.csv"


def append(path: Path, rows: Iterable[Row]) -> None:
    """Write rows at the end of a file, which is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow(_text(name, getattr(row, name)) for name in COLUMNS)


def _text(name: str, value: object) -> str:
    if isinstance(value, float):
        return format(value, DIGITS.get(name, ".4g"))
    return "" if value is None else str(value)


def read(folder: Path = RESULTS) -> list[Row]:
    """The newest row of every (case, provider) in a folder; files with other columns are not results of this suite."""
    newest: dict[tuple[str, ...], Row] = {}
    for path in sorted(folder.glob("*.csv")):
        for row in read_file(path):
            if row.key not in newest or newest[row.key].date <= row.date:
                newest[row.key] = row
    return list(newest.values())


def read_file(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        if list(reader.fieldnames or ()) != COLUMNS:
            return []
        return [_row(record) for record in reader]


def _row(record: dict[str, str]) -> Row:
    row = Row()
    for name, text in record.items():
        default = getattr(Row, name)
        if isinstance(default, str):
            setattr(row, name, text)
        elif isinstance(default, int):
            setattr(row, name, int(text or 0))
        else:
            setattr(row, name, float(text) if text else None)
    return row


def by_case(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows of one case together, in the order of the file."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases
