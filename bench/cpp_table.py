"""The table of docs/kernels.md: the C++ backend against the bare products, its own walk, and what others take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.cells import by_device, dates, number, ratio
from bench.rows import OK, Row, by_case, read

HEADER = (
    "op",
    "N, H, V",
    "ms",
    "/ torch.mm",
    "/ bare walk",
    "eager / ours",
    "compile / ours",
    "Liger / ours",
    "error, ours / eager",
    "peak MB, ours / eager",
)
NAMES = {"divergence": "score", "policy_loss": "policy loss", "logprob": "log-prob"}
# Scoring gives every statistic at once, so it is compared with plain PyTorch that does.
EAGER = {"divergence": "eager-all"}


def table(results: Path) -> str:
    """A row for each case of the ops above; a block for each processor."""
    blocks = []
    for device, rows in by_device(read(results)).items():
        cases = [_line({r.provider: r for r in case}) for case in by_case(rows).values() if _wanted(case)]
        if cases:
            head = [f"**{device}**, {rows[0].threads} threads, torch {rows[0].torch}, {dates(rows)}", ""]
            blocks.append("\n".join([*head, f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|", *cases]))
    return "\n\n".join(blocks) or "No results yet."


def _wanted(case: Sequence[Row]) -> bool:
    return case[0].op in NAMES and any(r.provider == "cpp" and r.status == OK for r in case)


def _line(case: Mapping[str, Row]) -> str:
    cpp = case["cpp"]
    eager = case.get(EAGER.get(cpp.op, "eager"))
    name = NAMES[cpp.op] + ("" if cpp.mode == "full" or cpp.op == "divergence" else f" {cpp.mode}")
    cells = [
        f"{name}, {cpp.dtype}",
        f"{cpp.N:,}, {cpp.H:,}, {cpp.V:,}",
        number(cpp.median_ms),
        number(cpp.floor_ratio),
        number(cpp.median_ms / walk.median_ms)
        if (walk := case.get("walk")) and walk.median_ms and cpp.median_ms
        else "",
        *(
            ratio(case[p], cpp) if p in case else ""
            for p in (eager.provider if eager else "", "compile", "liger-chunked")
        ),
        _pair(cpp.error, eager.error if eager else None, ".0e"),
        _pair(cpp.peak_mb, eager.peak_mb if eager else None, ",.0f"),
    ]
    return f"| {' | '.join(cells)} |"


def _pair(ours: float | None, other: float | None, digits: str) -> str:
    return " / ".join("" if x is None else format(x, digits) for x in (ours, other)).strip(" /")
