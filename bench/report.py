"""The documents' tables, generated from the CSVs between markers: `<!-- bench:NAME -->` and `<!-- /bench -->`.

Needs only the standard library, because `make lint` uses it to find stale tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bench.cases import PRODUCTS
from bench.results import OK, RESULTS, ROOT, Row, TrainingRow, by_case, by_device, newest_devices, read, read_training

DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/kernels.md")
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.S)
OURS = ("triton", "cpp", "torch", "ours")
NO_PEERS = ("matmul", "sweep", "eager-all")  # not comparable: they compute less than the op, or more
BUSY = 0.25  # cores that other programs used, above which a row's times are marked
NOTHING = "No results yet."
STAGES = ("rollout", "update", "score", "credit", "reference")

# The short table shows the ops that a training step calls, each in its last mode at the largest workload (n H V) that
# was timed, in half precision if measured: the cases closest to training, whatever the result. It always includes our
# worst case.
SHOWN_OPS = ("sgcd", "policy_loss", "logprob", "divergence")


def write_tables(check: bool, root: Path = ROOT, results: Path = RESULTS) -> int:
    """Write the tables, or (`check`) list the documents with stale ones and return 1."""
    stale = []
    for name in DOCUMENTS:
        path = root / name
        text = path.read_text(encoding="utf-8")
        fresh = fill_blocks(text, results)
        if fresh != text:
            stale.append(name)
            if not check:
                path.write_text(fresh, encoding="utf-8")
    if check and stale:
        print(f"stale tables in {', '.join(stale)}; run: python -m bench table", file=sys.stderr)
    elif not check:
        print(f"wrote {', '.join(stale)}" if stale else "the tables are fresh")
    return 1 if check and stale else 0


def fill_blocks(text: str, results: Path = RESULTS) -> str:
    """`text` with its blocks regenerated."""

    def fill(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"unknown table {found[2]!r}; there are {', '.join(TABLES)}")
        return f"{found[1]}\n{TABLES[found[2]](results)}\n\n{found[3]}"

    return BLOCK.sub(fill, text)


def short_table(results: Path) -> str:
    """Five cases of the newest CPU and GPU, our worst among them, and in how many of all cases we are the fastest."""
    blocks = []
    for device, rows in newest_devices(read(results)).items():
        compared = [Comparison(case) for case in by_case(rows) if Comparison.possible(case)]
        if not compared:
            continue
        won = sum(not is_loss(c.margin) for c in compared)
        lines = [f"**{device}**, torch {rows[0].torch}, {_days(rows)}."]
        lines += [f"sgcd-kernels is the fastest in {won} of {len(compared)} cases; what it loses is bold.", ""]
        lines += _table(Comparison.HEADER, [c.cells() for c in shown_cases(compared)])
        blocks.append("\n".join([*lines, *legend(rows)]))
    return "\n\n".join(blocks) or NOTHING


def shown_cases(compared: Sequence[Comparison]) -> list[Comparison]:
    """The rows of the short table: see `SHOWN_OPS`."""
    shown = []
    for op in SHOWN_OPS:
        cases = [c for c in compared if c.best.op == op and c.best.mode == list(PRODUCTS[op])[-1]]
        if cases:
            shown.append(max(cases, key=lambda c: (c.best.dtype != "fp32", c.best.kept * c.best.H * c.best.V)))
    worst = min(compared, key=lambda c: c.margin)
    return shown if worst in shown else [*shown, worst]


def case_table(results: Path) -> str:
    """Every case of the newest CPU and GPU: our fastest backend, plain PyTorch, and the fastest of all others."""
    blocks = []
    for device, rows in newest_devices(read(results)).items():
        compared = [Comparison(case) for case in by_case(rows) if Comparison.possible(case)]
        lines = [f"**{device}**, torch {rows[0].torch}, {_commits(rows)}", ""]
        blocks.append("\n".join([*lines, *_table(Comparison.HEADER, [c.cells() for c in compared]), *legend(rows)]))
    return "\n\n".join(blocks) or NOTHING


class Comparison:
    """Our fastest backend in one case beside plain PyTorch and the fastest of all other providers."""

    HEADER = (
        "op",
        "head, tokens",
        "ms",
        "/ matmul",
        "eager / ours",
        "best other / ours",
        "peak MB, ours / eager",
    )

    @staticmethod
    def possible(case: Sequence[Row]) -> bool:
        return case[0].op != "credit" and any(is_ours(r.provider) and r.median_ms for r in case if r.status == OK)

    def __init__(self, case: Sequence[Row]) -> None:
        timed = [r for r in case if r.status == OK and r.median_ms]
        peers = [r for r in timed if not is_ours(r.provider) and r.provider not in NO_PEERS]
        self.best = min((r for r in timed if is_ours(r.provider)), key=_ms)
        self.eager = next((r for r in case if r.provider == "eager"), None)
        self.other = min((r for r in peers if r.provider != "eager"), key=_ms, default=None)
        self.margin = min((_ms(r) / _ms(self.best) for r in peers), default=float("inf"))  # over the fastest peer

    def cells(self) -> list[str]:
        best, eager, other = self.best, self.eager, self.other
        return [
            f"{best.op} {best.mode}",
            f"{best.shape} {best.dtype}, {best.N:,}",
            f"{number(best.median_ms)}{mark(best)} ({best.provider})",
            number(best.matmul_ratio),
            ratio(eager, best) if eager else "",
            f"{ratio(other, best)} ({other.provider})" if other else "",
            f"{_peak(best, eager)} / {number(eager.peak_mb) if eager else ''}",
        ]


def full_table(results: Path) -> str:
    """Every row, losers and those that did not run among them."""
    header = ("provider", "ms", "p20 - p80", "/ matmul", "TFLOP/s", "peak MB", "error", "gradient")
    blocks = []
    for device, rows in by_device(read(results)).items():
        lines = [f"### {device}", "", f"{_versions(rows)}; {_commits(rows)}."]
        for case in by_case(rows):
            r, units = case[0], PRODUCTS[case[0].op][case[0].mode]
            tokens = f"N {r.N:,} ({r.kept:,} with a loss)"
            title = f"**{r.op}, {r.mode}**: {r.shape}, {r.dtype}, {tokens}, H {r.H:,}, V {r.V:,}"
            order = sorted(case, key=lambda x: (x.median_ms is None, x.median_ms or 0.0))
            lines += ["", title + (f"; matmul baseline {units:g} U" if units else ""), ""]
            lines += _table(header, [_full_cells(row) for row in order])
        blocks.append("\n".join([*lines, *legend(rows)]))
    return "\n\n".join(blocks) or NOTHING


def _full_cells(r: Row) -> list[str]:
    if r.status != OK:
        return [r.provider, r.status, *[""] * 6]
    spread = f"{number(r.p20_ms)} - {number(r.p80_ms)}" if r.samples > 1 else "one sample"
    cells = [r.provider, f"{number(r.median_ms)}{mark(r)}", spread if r.median_ms else "", number(r.matmul_ratio)]
    cells += [number(r.tflops), number(r.peak_mb)]
    return cells + ["" if x is None else f"{x:.0e}" for x in (r.error, r.grad_error)]


def cpp_table(results: Path) -> str:
    """docs/kernels.md: the C++ backend against the bare products, its sweep without an op, and other providers."""
    header = (
        "op",
        "N, H, V",
        "ms",
        "/ matmul",
        "/ bare sweep",
        "eager / ours",
        "compile / ours",
        "Liger / ours",
        "error, ours / eager",
        "peak MB, ours / eager",
    )
    blocks = []
    for device, rows in by_device(read(results)).items():
        cases = [{r.provider: r for r in case} for case in by_case(rows) if case[0].op in CPP_OPS]
        lines = [_cpp_cells(case) for case in cases if "cpp" in case and case["cpp"].status == OK]
        if lines:
            title = f"**{device}**, {rows[0].threads} threads, torch {rows[0].torch}, {_commits(rows)}"
            blocks.append("\n".join([title, "", *_table(header, lines)]))
    return "\n\n".join(blocks) or NOTHING


CPP_OPS = {"divergence": "score", "policy_loss": "policy loss", "logprob": "log-prob"}


def _cpp_cells(case: Mapping[str, Row]) -> list[str]:
    cpp, sweep = case["cpp"], case.get("sweep")
    # Scoring computes all statistics at once, so it is compared with plain PyTorch that does the same.
    eager = case.get("eager-all" if cpp.op == "divergence" else "eager")
    name = CPP_OPS[cpp.op] + ("" if cpp.mode == "full" or cpp.op == "divergence" else f" {cpp.mode}")
    others = [eager, case.get("compile"), case.get("liger-chunked")]
    return [
        f"{name}, {cpp.dtype}",
        f"{cpp.N:,}, {cpp.H:,}, {cpp.V:,}",
        number(cpp.median_ms),
        number(cpp.matmul_ratio),
        number(cpp.median_ms / sweep.median_ms) if sweep and sweep.median_ms and cpp.median_ms else "",
        *(ratio(r, cpp, bold=False) if r else "" for r in others),
        _pair(cpp.error, eager.error if eager else None, ".0e"),
        _pair(cpp.peak_mb, eager.peak_mb if eager else None, ",.0f"),
    ]


def _pair(ours: float | None, other: float | None, digits: str) -> str:
    return " / ".join("" if x is None else format(x, digits) for x in (ours, other)).strip(" /")


def training_table(results: Path) -> str:
    """A row per trainer and task."""
    header = (
        "task",
        "trainer",
        "s / step",
        "rollout tokens/s",
        "update tokens/s",
        "rollout, update, score, credit, reference",
        "SGCD adds",
    )
    rows = sorted(read_training(results), key=lambda r: (r.device, r.task, r.provider))
    blocks = []
    for device in dict.fromkeys(r.device for r in rows):
        mine = [r for r in rows if r.device == device]
        r = mine[0]
        title = f"**{device}**, {r.threads} thread(s), torch {r.torch}, transformers {r.transformers}, {_commits(mine)}"
        blocks.append("\n".join([title, "", *_table(header, [_training_cells(r) for r in mine])]))
    return "\n\n".join(blocks) or NOTHING


def _training_cells(r: TrainingRow) -> list[str]:
    if r.status != OK:
        return [r.task, r.provider, r.status, *[""] * 4]
    shares = [getattr(r, f"{stage}_share") for stage in STAGES]
    return [
        r.task,
        r.provider,
        f"{r.seconds_per_step:.2f}",
        f"{r.rollout_tokens_per_s:.0f}",
        f"{r.update_tokens_per_s:.0f}",
        ", ".join("-" if share is None else f"{share:.0%}" for share in shares),
        "" if r.sgcd_overhead is None else f"{r.sgcd_overhead:.0%}",
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return [head, "|---" * len(header) + "|", *lines]


def is_ours(provider: str) -> bool:
    return provider.removesuffix("-lse") in OURS


def _ms(r: Row) -> float:
    return r.median_ms or 0.0


def ratio(other: Row, ours: Row, bold: bool = True) -> str:
    """Time of the other over ours; bold if ours is longer."""
    if other.status != OK or not other.median_ms or not ours.median_ms:
        return other.status if other.status == "out of memory" else ""
    found = other.median_ms / ours.median_ms
    text = f"{number(found)} x"
    return f"**{text}**" if bold and is_loss(found) else text


def _peak(ours: Row, eager: Row | None) -> str:
    """Our peak memory; bold if eager's is lower."""
    text, other = number(ours.peak_mb), eager.peak_mb if eager else None
    return f"**{text}**" if ours.peak_mb and other and other < ours.peak_mb else text


def is_loss(ratio: float) -> bool:
    """Whether a ratio (another's time to ours) is below 1 when rounded to the tables' two digits."""
    return round(ratio, 2) < 1


def number(value: float | None) -> str:
    """Three digits; thousands with commas."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def mark(r: Row) -> str:
    return "~" if (r.others or 0.0) > BUSY else ""


def legend(rows: Sequence[Row]) -> list[str]:
    if not any(mark(r) for r in rows):
        return []
    return ["", f"~ other programs used more than {BUSY:g} cores meanwhile: read ratios, not milliseconds."]


def _days(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({r.date[:10] for r in rows}))


def _commits(rows: Sequence[Row] | Sequence[TrainingRow]) -> str:
    return ", ".join(sorted({f"{r.date[:10]} at {r.sha}" for r in rows}))


def _versions(rows: Sequence[Row]) -> str:
    r = rows[0]
    parts = [f"torch {r.torch}", f"triton {r.triton}" if r.triton else "", f"Python {r.python}"]
    parts.append(f"{r.threads} threads" if r.threads else "")
    return ", ".join(part for part in parts if part)


TABLES: dict[str, Callable[[Path], str]] = {
    "summary": short_table,
    "cases": case_table,
    "full": full_table,
    "cpp": cpp_table,
    "training": training_table,
}
