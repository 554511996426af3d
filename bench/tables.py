"""The documents' tables, generated from the CSVs between markers: `<!-- bench:NAME -->` and `<!-- /bench -->`.

Needs neither torch nor anything else, because `make lint` asks it whether a table is stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import cpp_table, training_rows
from bench.cases import OPS
from bench.cells import by_device, dates, legend, mark, ms, newest, number, ratio, versions
from bench.rows import OK, RESULTS, Row, by_case, read

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/kernels.md")
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.S)
OURS = ("triton", "cpp", "torch", "ours")
FLOOR = "gemm"


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
    """Of the newest CPU and GPU a row a case: our fastest backend, plain PyTorch, and the fastest of everybody else."""
    blocks = []
    for device, rows in newest(by_device(read(results))).items():
        lines = [
            f"**{device}**, torch {rows[0].torch}, {dates(rows)}",
            "",
            "| op | head, tokens | ms | / floor | eager / ours | best other / ours | peak MB, ours / eager |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [line for case in by_case(rows).values() if (line := _summary_line(case))]
        blocks.append("\n".join([*lines, *legend(rows)]))
    return "\n\n".join(blocks) or "No results yet."


def _summary_line(case: Sequence[Row]) -> str:
    timed = [r for r in case if r.status == OK and r.median_ms]
    mine = [r for r in timed if _ours(r.provider)]
    if not mine or case[0].op == "credit":
        return ""
    best = min(mine, key=ms)
    eager = next((r for r in case if r.provider == "eager"), None)
    others = [r for r in timed if not _ours(r.provider) and r.provider not in (FLOOR, "walk", "eager", "eager-all")]
    other = min(others, key=ms, default=None)
    cells = [
        f"{best.op} {best.mode}",
        f"{best.shape} {best.dtype}, {best.N:,}",
        f"{number(ms(best))}{mark(best)} ({best.provider})",
        number(best.floor_ratio),
        ratio(eager, best) if eager else "",
        f"{ratio(other, best)} ({other.provider})" if other else "",
        f"{number(best.peak_mb)} / {number(eager.peak_mb) if eager else ''}",
    ]
    return f"| {' | '.join(cells)} |"


def full(results: Path) -> str:
    """Every row, losers and those that did not run among them."""
    blocks = []
    for device, rows in by_device(read(results)).items():
        lines = [f"### {device}", "", f"{versions(rows)}; {dates(rows)}."]
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
        blocks.append("\n".join([*lines, *legend(rows)]))
    return "\n\n".join(blocks) or "No results yet."


def _full_line(r: Row) -> str:
    if r.status != OK:
        return f"| {r.provider} | {r.status} |" + " |" * 6
    spread = f"{number(r.p20_ms)} - {number(r.p80_ms)}" if r.samples > 1 else "one sample"
    cells = [r.provider, f"{number(r.median_ms)}{mark(r)}", spread if r.median_ms else "", number(r.floor_ratio)]
    cells += [number(r.tflops), number(r.peak_mb)]
    cells += ["" if x is None else f"{x:.0e}" for x in (r.error, r.grad_error)]
    return f"| {' | '.join(cells)} |"


def _ours(provider: str) -> bool:
    return provider.removesuffix("-lse") in OURS


TABLES: dict[str, Callable[[Path], str]] = {
    "summary": summary,
    "full": full,
    "cpp": cpp_table.table,
    "training": training_rows.table,
}
