"""The rows of the trainer's benchmark, and their table. Needs no torch."""

from __future__ import annotations

import csv
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from bench.rows import OK, RESULTS, slug


@dataclass
class TrainingRow:
    """Means over the measured steps of one trainer on one task."""

    task: str = ""
    provider: str = ""
    status: str = OK
    steps: str = ""
    seconds_per_step: str = ""
    rollout_tokens_per_s: str = ""  # sampled tokens over seconds of rollouts
    update_tokens_per_s: str = ""  # loss tokens over seconds of updates
    rollout_share: str = ""  # of a step's time
    update_share: str = ""
    score_share: str = ""
    credit_share: str = ""
    reference_share: str = ""
    sgcd_overhead: str = ""  # time of score, credit and reference over that of rollouts and updates
    version: str = ""
    device: str = ""
    threads: str = ""
    others: str = ""  # cores that other programs used meanwhile
    torch: str = ""
    transformers: str = ""
    sha: str = ""
    date: str = ""


COLUMNS = [f.name for f in fields(TrainingRow)]
SHARES = ("rollout", "update", "score", "credit", "reference")


def path_of(row: TrainingRow, folder: Path = RESULTS) -> Path:
    return folder / f"train_{slug(row.device)}_{row.date[:10]}_{row.sha}.csv"


def append(path: Path, row: TrainingRow) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(astuple(row))


def read(folder: Path = RESULTS) -> list[TrainingRow]:
    """The newest row of every (device, task, provider)."""
    newest: dict[tuple[str, str, str], TrainingRow] = {}
    for path in sorted(folder.glob("train_*.csv")):
        with path.open(newline="", encoding="utf-8") as lines:
            for record in csv.DictReader(lines):
                row = TrainingRow(**record)
                key = (row.device, row.task, row.provider)
                if key not in newest or newest[key].date <= row.date:
                    newest[key] = row
    return list(newest.values())


def table(results: Path) -> str:
    """A row a trainer and task."""
    rows = sorted(read(results), key=lambda r: (r.device, r.task, r.provider))
    blocks = []
    for device in dict.fromkeys(r.device for r in rows):
        mine = [r for r in rows if r.device == device]
        lines = [
            f"**{device}**, {mine[0].threads} thread(s), torch {mine[0].torch}, transformers {mine[0].transformers}, "
            f"{mine[0].date[:10]} at {mine[0].sha}",
            "",
            "| task | trainer | s / step | rollout tokens/s | update tokens/s "
            "| rollout, update, score, credit, reference | SGCD adds |",
            "|---|---|---|---|---|---|---|",
        ]
        blocks.append("\n".join(lines + [_line(r) for r in mine]))
    return "\n\n".join(blocks) or "No results yet."


def _line(r: TrainingRow) -> str:
    if r.status != OK:
        return f"| {r.task} | {r.provider} | {r.status} | | | | |"
    shares = ", ".join(f"{float(share):.0%}" if (share := getattr(r, f"{name}_share")) else "-" for name in SHARES)
    cells = [r.task, r.provider, r.seconds_per_step, r.rollout_tokens_per_s, r.update_tokens_per_s, shares]
    return f"| {' | '.join(cells)} | {f'{float(r.sgcd_overhead):.0%}' if r.sgcd_overhead else ''} |"
