"""The documents' tables, generated from the CSVs between markers: `<!-- bench:NAME -->` and `<!-- /bench -->`.

Needs neither torch nor anything else, because `make lint` asks it whether a table is stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import training_rows
from bench.cases import OPS
from bench.rows import OK, RESULTS, Row, by_case, read

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/benchmarks.md")
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.S)
OURS = ("triton", "cpp", "torch", "ours")
FLOOR = "gemm"
BUSY = 0.25  # cores that other programs used, above which a row's times are marked


def main(check: bool, root: Path = ROOT, results: Path = RESULTS) -> int:
    """Write the tables, or say which documents' are stale (exit code 1)."""
    stale = []
    for name in DOCUMENTS:
        path = root / name
        text = path.read_text(encoding="utf-8")
        fresh = filled(text, results)
        if fresh != text:
            stale.append(name)
            if not check:
                path.write_text(fresh, encoding="utf-8")
    if check and stale:
        print(f"stale tables in {', '.join(stale)}; run: python -m bench table", file=sys.stderr)
    elif not check:
        print(f"wrote {', '.join(stale)}" if stale else "the tables are fresh")
    return 1 if check and stale else 0


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with its blocks made anew."""

    def fill(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"unknown table {found[2]!r}; there are {', '.join(TABLES)}")
        return f"{found[1]}\n{TABLES[found[2]](results)}\n\n{found[3]}"

    return BLOCK.sub(fill, text)


def summary(results: Path) -> str:
    """A row a case: our fastest backend, plain PyTorch, and the fastest of everybody else."""
    blocks = []
    for device, rows in _by_device(read(results)).items():
        lines = [
            f"**{device}**, torch {rows[0].torch}, {_dates(rows)}",
            "",
            "| op | head, tokens | ms | / floor | eager / ours | best other / ours | peak MB, ours / eager |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [line for case in by_case(rows).values() if (line := _summary_line(case))]
        blocks.append("\n".join([*lines, *_legend(rows)]))
    return "\n\n".join(blocks) or "No results yet."


def _summary_line(case: Sequence[Row]) -> str:
    timed = [r for r in case if r.status == OK and r.median_ms]
    mine = [r for r in timed if _ours(r.provider)]
    if not mine or case[0].op == "credit":
        return ""
    best = min(mine, key=_ms)
    eager = next((r for r in case if r.provider == "eager"), None)
    others = [r for r in timed if not _ours(r.provider) and r.provider not in (FLOOR, "walk", "eager", "eager-all")]
    other = min(others, key=_ms, default=None)
    cells = [
        f"{best.op} {best.mode}",
        f"{best.shape} {best.dtype}, {best.N:,}",
        f"{_number(_ms(best))}{_mark(best)} ({best.provider})",
        _number(best.floor_ratio),
        _ratio(eager, best) if eager else "",
        f"{_ratio(other, best)} ({other.provider})" if other else "",
        f"{_number(best.peak_mb)} / {_number(eager.peak_mb) if eager else ''}",
    ]
    return f"| {' | '.join(cells)} |"


def full(results: Path) -> str:
    """Every row, losers and those that did not run among them."""
    blocks = []
    for device, rows in _by_device(read(results)).items():
        lines = [f"### {device}", "", f"{_versions(rows)}; {_dates(rows)}."]
        for case in by_case(rows).values():
            r = case[0]
            lines += [
                "",
                f"**{r.op}, {r.mode}**: {r.shape}, {r.dtype}, N {r.N:,} ({r.kept:,} with a loss), H {r.H:,}, V {r.V:,}"
                + (f"; floor {OPS[r.op].floor[r.mode]:g} U" if OPS[r.op].floor[r.mode] else ""),
                "",
                "| provider | ms | p20 - p80 | / floor | TFLOP/s | peak MB | error | gradient |",
                "|---|---|---|---|---|---|---|---|",
            ]
            lines += [_full_line(row) for row in sorted(case, key=lambda x: (x.median_ms is None, x.median_ms or 0.0))]
        blocks.append("\n".join([*lines, *_legend(rows)]))
    return "\n\n".join(blocks) or "No results yet."


def _full_line(r: Row) -> str:
    if r.status != OK:
        return f"| {r.provider} | {r.status} |" + " |" * 6
    spread = f"{_number(r.p20_ms)} - {_number(r.p80_ms)}" if r.samples > 1 else "one sample"
    cells = [r.provider, f"{_number(r.median_ms)}{_mark(r)}", spread if r.median_ms else "", _number(r.floor_ratio)]
    cells += [_number(r.tflops), _number(r.peak_mb)]
    cells += ["" if x is None else f"{x:.0e}" for x in (r.error, r.grad_error)]
    return f"| {' | '.join(cells)} |"


def _ours(provider: str) -> bool:
    return provider.removesuffix("-lse") in OURS


def _ms(r: Row) -> float:
    return r.median_ms or 0.0


def _ratio(other: Row, best: Row) -> str:
    if other.status != OK or not other.median_ms:
        return other.status if other.status == "out of memory" else ""
    return f"{_number(other.median_ms / _ms(best))} x"


def _number(value: float | None) -> str:
    """Three digits; thousands with commas."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _mark(r: Row) -> str:
    return "~" if (r.others or 0.0) > BUSY else ""


def _legend(rows: Sequence[Row]) -> list[str]:
    if not any(_mark(r) for r in rows):
        return []
    return ["", f"~ other programs used more than {BUSY:g} cores meanwhile: read ratios, not milliseconds."]


def _by_device(rows: Sequence[Row]) -> dict[str, list[Row]]:
    devices: dict[str, list[Row]] = {}
    order = list(OPS)
    for row in sorted(rows, key=lambda r: (r.device, order.index(r.op), r.mode, r.dtype, r.V, r.N)):
        devices.setdefault(row.device, []).append(row)
    return devices


def _dates(rows: Sequence[Row]) -> str:
    shas = sorted({f"{r.date[:10]} at {r.sha}" for r in rows})
    return ", ".join(shas)


def _versions(rows: Sequence[Row]) -> str:
    r = rows[0]
    parts = [f"torch {r.torch}", f"triton {r.triton}" if r.triton else "", f"Python {r.python}"]
    parts.append(f"{r.threads} threads" if r.threads else "")
    return ", ".join(part for part in parts if part)


TABLES: dict[str, Callable[[Path], str]] = {
    "summary": summary,
    "full": full,
    "training": training_rows.table,
}
