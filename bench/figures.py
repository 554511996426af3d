"""Pictures from the CSVs: time and memory over tokens, time over the matmul baseline; and the front page's figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases import PRODUCTS, UserError
from bench.report import is_ours
from bench.results import OK, Row, newest_devices, read, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARE = ("matmul", "sweep")
# One colour per provider in every picture; ours are blues.
COLOURS = {
    "triton": "#08306b",
    "triton-lse": "#08519c",
    "cpp": "#2171b5",
    "cpp-lse": "#6baed6",
    "torch": "#41b6c4",
    "torch-lse": "#a1dab4",
    "matmul": "#000000",
    "sweep": "#636363",
    "eager": "#d94801",
    "eager-all": "#fd8d3c",
    "compile": "#fdae6b",
    "torch-linear-ce": "#bf812d",
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

# The front page's figure: forward and backward of the policy loss, which Liger has too, at a head that a CPU can train.
FRONT_CASE = ("policy_loss", "full", "smollm2")
FRONT_NAMES = {"eager": "PyTorch", "liger-chunked": "Liger", "compile": "torch.compile"}  # and ours
FRONT_COLOURS = {"PyTorch": "#d94801", "Liger": "#238b45", "torch.compile": "#e69f00", "sgcd-kernels": "#2171b5"}


def plot_all(results: Path, out: Path | None = None) -> int:
    """Draw every plot that the rows of the newest CPU and GPU allow; print their paths."""
    _load_matplotlib()
    rows = [r for r in read(results) if r.status == OK]
    if not rows:
        raise UserError(f"no results in {results}; run: python -m bench run")
    folder = out or results / "plots"
    groups: dict[tuple[str, ...], list[Row]] = {}  # rows that differ in tokens and provider only
    for device, mine in newest_devices(rows).items():
        for r in mine:
            if r.op != "credit":
                groups.setdefault((device, r.op, r.mode, r.shape, r.dtype), []).append(r)
    written = [path for group in groups.values() for path in draw(group, folder)]
    print("\n".join(str(path) for path in written))
    return 0


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The plots of one op, mode, head and dtype on one device."""
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
    bars = [x for x in rows if largest == x.N and x.matmul_ratio is not None and x.provider != "matmul"]
    if bars:
        written += _save(folder / f"{stem}_matmul", rows, lambda ax: _bars(ax, bars, largest))
    return written


def draw_front_page(results: Path, out: Path) -> int:
    """Peak memory and time of the policy loss over tokens: plain PyTorch, torch.compile, Liger and ours."""
    _load_matplotlib()
    import matplotlib.pyplot as plt

    rows = _front_rows(read(results))
    series = _series(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", facecolor="white")
    _front_memory(left, series)
    _front_times(right, series)
    r = rows[0]
    title = f"Policy loss, forward and backward: hidden states [N, {r.H:,}], head [{r.V:,}, {r.H:,}], {r.dtype}"
    figure.suptitle(title, fontsize=12, fontweight="bold")
    device = f"{'CPU' if r.threads else 'GPU'}: {r.device}"
    days = ", ".join(sorted({x.date[:10] for x in rows}))
    # supxlabel alone makes the layout leave room below the panels.
    figure.supxlabel(device, fontsize=9, color="#555555", x=0.01, ha="left")
    figure.text(0.99, 0.012, f"torch {r.torch}, {days}", fontsize=9, color="#555555", ha="right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100, metadata={"Software": None} if out.suffix == ".png" else None)
    plt.close(figure)
    print(out)
    return 0


def _front_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of `FRONT_CASE` on the device and dtype with the most values of N; of several, the newest."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        named = r.provider in FRONT_NAMES or (is_ours(r.provider) and r.provider != "torch")
        if (r.op, r.mode, r.shape) == FRONT_CASE and named:
            groups.setdefault((r.device, r.dtype), []).append(r)

    def size(group: list[Row]) -> tuple[int, str]:
        return len({r.N for r in group if r.status == OK}), max(r.date for r in group)

    best = max(groups.values(), key=size, default=[])
    if len({r.N for r in best if r.median_ms}) < 2:
        op, mode, shape = FRONT_CASE
        what = f"--op {op} --mode {mode} --shape {shape} --tokens 256 1024 4096"
        raise UserError(f"the figure needs times for two numbers of tokens; run: python -m bench run {what}")
    return best


def _series(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Rows by name in the figure and by N; of our backends, the fastest (or the only one)."""
    series: dict[str, dict[int, Row]] = {name: {} for name in FRONT_COLOURS}
    for r in sorted(rows, key=lambda r: -(r.median_ms or 0.0)):
        if r.provider in FRONT_NAMES or r.status == OK:
            series[FRONT_NAMES.get(r.provider, "sgcd-kernels")][r.N] = r
    return {name: dict(sorted(found.items())) for name, found in series.items() if found}


def _front_memory(ax: Axes, series: Mapping[str, Mapping[int, Row]]) -> None:
    notes: list[str] = []
    for name, found in series.items():
        points = {n: r.peak_mb for n, r in found.items() if r.peak_mb}
        ours, colour = name == "sgcd-kernels", FRONT_COLOURS[name]
        style: dict[str, Any] = {"linewidth": 3 if ours else 2, "marker": "o", "markersize": 7 if ours else 5}
        ax.plot(list(points), list(points.values()), color=colour, **style)
        last = max(points, default=0)
        failed = [f"{name}, N {n:,}: {r.status}" for n, r in found.items() if n > last and r.status != OK]
        notes += failed
        if points:
            # Label a line that ends early at its start, where it meets no other line.
            at, offset, va = (min(points), (-6, 12), "bottom") if failed else (last, (10, 0), "center")
            text: dict[str, Any] = {"fontsize": 10, "color": colour, "fontweight": "bold" if ours else "normal"}
            label = f"{name}  {_size(points[last])}"
            ax.annotate(label, (at, points[at]), offset, textcoords="offset points", va=va, **text)
    ax.text(0.02, 0.97, "\n".join(notes), transform=ax.transAxes, va="top", fontsize=9, color="#555555")
    r = next(iter(next(iter(series.values())).values()))
    gradient = r.V * r.H * (4 if r.dtype == "fp32" else 2) / 2**20
    ticks = sorted({n for found in series.values() for n, x in found.items() if x.peak_mb})
    ax.axhline(gradient, color="#555555", linewidth=1, linestyle=":")
    ax.annotate(
        f"the head's gradient, {_size(gradient)}",
        (ticks[-1], gradient),
        (0, -5),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
        color="#555555",
    )
    ax.set_title("Peak memory beyond the inputs, gradients included", fontsize=11)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=10)
    ax.set_xlim(ticks[0] * 0.8, ticks[-1] * 9)  # room for the labels
    ax.set_ylim(bottom=gradient * 0.55)
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.yaxis.set_major_formatter(lambda value, _: _size(value))
    ax.minorticks_off()
    _front_axis(ax)


def _front_times(ax: Axes, series: Mapping[str, Mapping[int, Row]]) -> None:
    """Bars, because only a few values of N are timed."""
    ticks = sorted({n for found in series.values() for n, r in found.items() if r.median_ms})
    width = 0.8 / len(series)
    for k, (name, found) in enumerate(series.items()):
        at = [i + (k - (len(series) - 1) / 2) * width for i, n in enumerate(ticks) if n in found and found[n].median_ms]
        times = [found[n].median_ms or 0.0 for n in ticks if n in found and found[n].median_ms]
        bars = ax.bar(at, times, width * 0.92, color=FRONT_COLOURS[name], label=name)
        bold = "bold" if name == "sgcd-kernels" else "normal"
        ax.bar_label(bars, [f"{t:,.0f}" for t in times], padding=2, fontsize=10, fontweight=bold)
    ax.set_title("Time, milliseconds", fontsize=11)
    ax.set_xticks(range(len(ticks)), [f"{n:,}" for n in ticks])
    ax.margins(y=0.1)
    ax.legend(frameon=False, fontsize=10, loc="upper left")
    _front_axis(ax)


def _front_axis(ax: Axes) -> None:
    ax.set_xlabel("tokens N (30 % of them masked)", fontsize=10)
    ax.grid(axis="y", alpha=0.25)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _size(megabytes: float) -> str:
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def _load_matplotlib() -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("matplotlib is not installed; run: pip install 'sgcd-kernels[bench]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same rows give the same file


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
        ax.plot([r.N for r in mine], values, label=provider, color=COLOURS.get(provider), **style)
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
    """Start at zero; use a logarithmic axis if the values span too wide a range."""
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
    best = sorted(rows, key=lambda r: r.matmul_ratio or 0.0)[::-1]
    ratios = [r.matmul_ratio or 0.0 for r in best]
    ax.barh([r.provider for r in best], ratios, color=[COLOURS.get(r.provider, "#999999") for r in best])
    ax.axvline(1.0, color="black", linewidth=1, linestyle="--")
    for y, ratio in enumerate(ratios):
        ax.text(ratio, y, f" {ratio:.2f}", va="center", fontsize=8)
    ax.set_xlim(0, max(ratios) * 1.12)
    units = PRODUCTS[best[0].op][best[0].mode]
    ax.set_xlabel(f"time / matmul baseline ({units:g} bare products, dashed), {tokens:,} tokens")


def _ordered(providers: set[str]) -> list[str]:
    known = [p for p in COLOURS if p in providers]
    return known + sorted(providers - set(known))
