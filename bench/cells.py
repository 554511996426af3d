"""What the documents' tables are made of: numbers, ratios and marks, and rows by device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.cases import OPS
from bench.rows import OK, Row

BUSY = 0.25  # cores that other programs used, above which a row's times are marked


def ms(r: Row) -> float:
    return r.median_ms or 0.0


def ratio(other: Row, best: Row) -> str:
    if other.status != OK or not other.median_ms:
        return other.status if other.status == "out of memory" else ""
    return f"{number(other.median_ms / ms(best))} x"


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


def by_device(rows: Sequence[Row]) -> dict[str, list[Row]]:
    devices: dict[str, list[Row]] = {}
    order = list(OPS)
    for row in sorted(rows, key=lambda r: (r.device, order.index(r.op), r.mode, r.dtype, r.V, r.N)):
        devices.setdefault(row.device, []).append(row)
    return devices


def newest(devices: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """The GPU and the CPU that were measured last."""
    order = sorted(devices, key=lambda device: max(r.date for r in devices[device]))
    last = {bool(devices[device][0].threads): device for device in order}
    return {last[kind]: devices[last[kind]] for kind in sorted(last)}


def dates(rows: Sequence[Row]) -> str:
    shas = sorted({f"{r.date[:10]} at {r.sha}" for r in rows})
    return ", ".join(shas)


def versions(rows: Sequence[Row]) -> str:
    r = rows[0]
    parts = [f"torch {r.torch}", f"triton {r.triton}" if r.triton else "", f"Python {r.python}"]
    parts.append(f"{r.threads} threads" if r.threads else "")
    return ", ".join(part for part in parts if part)
