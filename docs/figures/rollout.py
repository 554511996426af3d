"""Draw two siblings of a run, every token coloured by its weight W: docs/figures/rollout.png.

    python -m trainer.run train configs/workday_sgcd.yaml --max_steps 1 --output_dir runs/figure
    python docs/figures/rollout.py runs/figure/rollouts/step_1.jsonl

Which group and which of its siblings are drawn can be chosen; needs matplotlib (the extra `dev`).
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyBboxPatch, Rectangle

WIDTH, LINE = 1200, 34  # pixels: the figure, and the distance of two lines
LETTER = 11.2  # pixels a character of the monospaced font takes
HEAT = LinearSegmentedColormap.from_list("W", ["#ffffff", "#ffbe6b", "#f07c2b"])
INK, FAINT = "#1a1a1a", "#8a8a8a"
OUTCOME = {
    False: ("#b3261e", "failed, A < 0: the darker a token, the more its probability is lowered"),
    True: ("#1b7f3b", "solved, A > 0: the darker a token, the more its probability is raised"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="rollouts/step_N.jsonl of a run")
    parser.add_argument("--group", type=int, default=0)
    parser.add_argument("--siblings", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--clip", type=float, default=2.0, help="the run's credit.clip")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    args = parser.parse_args()
    group = json.loads(args.traces.read_text(encoding="utf-8").splitlines()[args.group])
    draw(group, [group["siblings"][i] for i in args.siblings], args.clip, args.out)


def draw(group: dict[str, Any], siblings: list[dict[str, Any]], clip: float, out: Path) -> None:
    lines = sum(max(s["turns"]) + 2 for s in siblings)
    reference = textwrap.wrap(f"Reference, read by the teacher only: {group['reference'].replace(' .', '.')}", 112)
    height = (lines + len(reference)) * LINE + 70
    figure = pyplot.figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    y = 34.0
    write(axes, 24, y, f'Task: "{group["task"]["instruction"].replace(" ,", ",")}"', INK, weight="bold")
    legend(axes, WIDTH - 330, y, clip)
    y += 6
    for line in reference:
        y += 26
        write(axes, 24, y, line, FAINT, size=11.5)
    for sibling in siblings:
        y += LINE * 1.25
        colour, name = OUTCOME[sibling["reward"] > 0]
        write(axes, 24, y, name, colour, weight="bold")
        axes.plot([16, 16], [y - 12, y + (max(sibling["turns"]) + 1) * LINE + 12], color=colour, linewidth=4)
        for turn in range(max(sibling["turns"]) + 1):
            y += LINE
            draw_turn(axes, y, [t for t in tokens(sibling) if t[0] == turn], clip)
    figure.savefig(out, pil_kwargs={"optimize": True})


def tokens(sibling: dict[str, Any]) -> list[tuple[int, str, bool, float]]:
    """(turn, text, whether the policy wrote it, W) of each token."""
    columns = (sibling[name] for name in ("turns", "pieces", "generated", "W"))
    return [(turn, text.strip(), bool(own), weight) for turn, text, own, weight in zip(*columns, strict=True)]


def draw_turn(axes: Axes, y: float, turn: list[tuple[int, str, bool, float]], clip: float) -> None:
    """One line: what the policy wrote in boxes, what the environment answered in grey."""
    x = 32.0
    for _, text, own, weight in turn:
        width = LETTER * len(text)
        if own:
            face = HEAT((weight - 1) / (clip - 1))
            box = FancyBboxPatch(
                (x, y - 13), width + 6, 26, boxstyle="round,pad=0,rounding_size=4", facecolor=face, edgecolor="#c9c9c9"
            )
            axes.add_patch(box)
        write(axes, x + 3, y, text, INK if own else FAINT)
        x += width + 11
    heaviest = max((weight for *_, own, weight in turn if own), default=1.0)
    if heaviest > 1:
        write(axes, WIDTH - 118, y, f"W = {heaviest:.2f}", INK)


def legend(axes: Axes, x: float, y: float, clip: float) -> None:
    write(axes, x, y, "W = 1", INK)
    for i in range(100):
        axes.fill_between([x + 70 + 1.6 * i, x + 71.8 + 1.6 * i], y - 11, y + 11, color=HEAT(i / 99), linewidth=0)
    axes.add_patch(Rectangle((x + 70, y - 11), 161, 22, fill=False, edgecolor="#c9c9c9"))
    write(axes, x + 240, y, f"{clip:g}", INK)


def write(axes: Axes, x: float, y: float, text: str, colour: str, weight: str = "normal", size: float = 13.4) -> None:
    axes.text(x, y, text, color=colour, weight=weight, size=size, family="DejaVu Sans Mono", va="center")


if __name__ == "__main__":
    main()
