"""Pictures from the CSVs, as PNG and SVG: time and memory over the number of tokens, bars of time over the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases import OPS
from bench.cells import by_device, newest
from bench.errors import UserError
from bench.rows import OK, Row, read, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARE = ("gemm", "walk")
# One colour a provider in every picture; ours are blues.
COLOURS = {
    "triton": "#08306b",
    "triton-lse": "#08519c",
    "cpp": "#2171b5",
    "cpp-lse": "#6baed6",
    "torch": "#41b6c4",
    "torch-lse": "#a1dab4",
    "gemm": "#000000",
    "walk": "#636363",
    "eager": "#d94801",
    "eager-all": "#fd8d3c",
    "compile": "#fdae6b",
    "trl": "#7a0177",
    "trl+liger": "#c51b8a",
    "trl+verl": "#f768a1",
    "liger": "#238b45",
    "liger-chunked": "#74c476",
    "cce": "#a50f15",
    "cce-compile": "#fb6a4a",
    "verl": "#b8860b",
    "quack": "#8c6d31",
}


def main(results: Path, out: Path | None = None) -> int:
    """Draw every picture that the rows of the newest CPU and GPU allow; say where they are."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("matplotlib is not installed; run: pip install 'sgcd-kernels[bench]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same rows give the same file
    rows = [r for r in read(results) if r.status == OK]
    if not rows:
        raise UserError(f"no results in {results}; run: python -m bench run")
    folder = out or results / "plots"
    shown = [row for device in newest(by_device(rows)).values() for row in device]
    written = [path for group in _groups(shown).values() for path in draw(group, folder)]
    print("\n".join(str(path) for path in written))
    return 0


def _groups(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows that differ in tokens and provider only."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        if r.op != "credit":
            groups.setdefault((r.device, r.op, r.mode, r.shape, r.dtype), []).append(r)
    return groups


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The pictures of one op, mode, head and dtype on one device."""
    r = rows[0]
    stem = f"{r.op}-{r.mode}_{r.shape}_{r.dtype}_{slug(r.device)}"
    written = []
    if len({x.N for x in rows}) > 1:
        speed = [x for x in rows if x.median_ms is not None]
        written += _save(folder / f"{stem}_speed", rows, lambda ax: _lines(ax, speed, "median_ms", "milliseconds"))
        memory = [x for x in rows if x.peak_mb is not None]
        if memory:
            label = "peak MB beyond the inputs"
            written += _save(folder / f"{stem}_memory", rows, lambda ax: _lines(ax, memory, "peak_mb", label))
    largest = max(x.N for x in rows)
    bars = [x for x in rows if largest == x.N and x.floor_ratio is not None and x.provider != "gemm"]
    if bars:
        written += _save(folder / f"{stem}_floor", rows, lambda ax: _bars(ax, bars, largest))
    return written


def _save(path: Path, rows: Sequence[Row], fill: Callable[[Axes], None]) -> list[Path]:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    r = rows[0]
    figure.suptitle(f"{r.op}, {r.mode}: {r.shape} head, H {r.H:,}, V {r.V:,}, {r.dtype}", fontsize=11)
    ax.set_title(f"{r.device}, torch {r.torch}, {r.date[:10]} at {r.sha}", fontsize=7.5, color="#555555")
    fill(ax)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, extra in (("png", {"dpi": 150}), ("svg", {})):
        file = path.with_name(f"{path.name}.{kind}")
        options: dict[str, Any] = {**extra, "metadata": {"Date": None} if kind == "svg" else None}
        figure.savefig(file, **options)
        written.append(file)
    plt.close(figure)
    return written


def _lines(ax: Axes, rows: Sequence[Row], column: str, label: str) -> None:
    for provider in _ordered({r.provider for r in rows}):
        mine = sorted((r for r in rows if r.provider == provider), key=lambda r: r.N)
        values = [getattr(r, column) for r in mine]
        style: dict[str, Any] = {"linestyle": "--" if provider in BARE else "-", "marker": "o", "markersize": 4}
        ax.plot([r.N for r in mine], values, label=_label(provider), color=COLOURS.get(provider), **style)
    if column == "peak_mb" and rows[0].mode != "forward":
        size = rows[0].V * rows[0].H * (4 if rows[0].dtype == "fp32" else 2) / 2**20
        ax.axhline(size, color="black", linewidth=1, linestyle=":", label="the weight's gradient")
    ax.set_xscale("log", base=2)
    ticks = sorted({r.N for r in rows})
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.set_xlabel("tokens, 30 % of them masked")
    ax.set_ylabel(label)
    _scale(ax, [getattr(r, column) for r in rows])
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _scale(ax: Axes, values: Sequence[float]) -> None:
    """From zero; logarithmic where the values differ by more than one such axis can show."""
    from matplotlib.ticker import LogLocator, NullLocator

    if max(values) > 10 * max(min(values), 1e-9):
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(min(values), max(values) / 1e4) * 0.8)
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}")
    ax.xaxis.set_minor_locator(NullLocator())


def _bars(ax: Axes, rows: Sequence[Row], tokens: int) -> None:
    best = sorted(rows, key=lambda r: r.floor_ratio or 0.0)[::-1]
    ratios = [r.floor_ratio or 0.0 for r in best]
    names = [_label(r.provider) for r in best]
    ax.barh(names, ratios, color=[COLOURS.get(r.provider, "#999999") for r in best])
    ax.axvline(1.0, color="black", linewidth=1, linestyle="--")
    for y, ratio in enumerate(ratios):
        ax.text(ratio, y, f" {ratio:.2f}", va="center", fontsize=8)
    ax.set_xlim(0, max(ratios) * 1.12)
    units = OPS[best[0].op].floor[best[0].mode]
    ax.set_xlabel(f"time / time of the bare library GEMMs ({units:g} products), {tokens:,} tokens; dashed: the floor")


def _label(provider: str) -> str:
    return {"gemm": "gemm (floor)", "walk": "walk (bare)"}.get(provider, provider)


def _ordered(providers: set[str]) -> list[str]:
    known = [p for p in COLOURS if p in providers]
    return known + sorted(providers - set(known))
