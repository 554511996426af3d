"""One page that shows a run: curves, siblings side by side, every token coloured by its credit.

The page is a single static file: the data stand in it as JSON, the script builds everything with `textContent`, and a
content policy that names the script by its hash forbids any other script and every network access. So neither a trace
that holds markup nor a tokenizer that does can run anything. Figures are shown as the run wrote them; what is left out
of a big run is listed at the top.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer import files
from trainer.data import TokenClass
from trainer.errors import UserError
from trainer.records.rollout_files import SCORES, read_step

ASSETS = Path(__file__).parents[1] / "assets" / "view"
MAX_TOKENS = 150_000  # embedded over the whole page: about 10 MB
MAX_STEPS = 24  # traced steps
MAX_POINTS = 1_500  # steps on a curve
MAX_SIBLINGS = 16  # of one group
MAX_PROMPT = 6_000  # characters
EARLIER_NAMES = {  # of runs before `credit/mean_weight` -> the names of today; other figures have the names they had
    "credit/w_mean": "credit/mean_weight",
    "credit/d_mean": "credit/mean_divergence",
    "credit/d_max": "credit/max_divergence",
    "credit/d_p95": "credit/p95_divergence",
    "credit/inert": "credit/low_divergence",
    "credit/frac_capped": "credit/frac_saturated",
    "credit/span_length": "credit/mean_span_length",
    "credit/spans": "credit/spans_per_rollout",
}
TEACHER = ("teacher_logp", "teacher_entropy")  # mean nothing where there was no teacher


def write(run_dir: Path) -> Path:
    """Write `run_dir/view.html` from the run's metrics and traces, and return its path.

    `UserError` when the folder has no metrics yet.
    """
    notes: list[str] = []
    data = {
        "title": run_dir.resolve().name,
        "config": read_config(run_dir),
        "metrics": thin(read_metrics(run_dir), notes),
        "steps": read_traces(run_dir, notes),
        "classes": [kind.name.lower().replace("_", " ") for kind in TokenClass],
        "notes": notes,
    }
    page = run_dir / "view.html"
    files.write(page, render(data))
    return page


def render(data: dict[str, Any]) -> str:
    """Put data, style and script into the frame. In JSON, `<` is escaped: no text can end its element."""
    style, script, frame = ((ASSETS / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    embedded = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    policy = f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'"
    parts = {"POLICY": policy, "STYLE": style, "SCRIPT": script, "DATA": embedded}
    for name, text in parts.items():  # DATA last: nothing in it is a place to fill
        frame = frame.replace(f"%%{name}%%", text, 1)
    return frame


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def read_config(run_dir: Path) -> dict[str, str]:
    """The few choices that tell runs apart; an unreadable config is shown as none."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    wanted = ("arm", "env.name", "model.path", "writer.name", "credit.rule", "learning_rate", "num_generations", "seed")
    found = {name: lookup(config, name.split(".")) for name in wanted}
    return {name: str(value) for name, value in found.items() if value is not None}


def lookup(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = config.get(name) if isinstance(config, dict) else None
    return config


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that a killed run left unfinished is skipped."""
    path = run_dir / "metrics.jsonl"
    try:
        records = list(parsed(path.read_text(encoding="utf-8").splitlines()))
    except OSError:
        records = []
    if not records:
        raise UserError(f"{path}: no metrics to show; give the run directory of a run that has finished a step")
    return [{name: number(value) for name, value in rename_earlier(record).items()} for record in records]


def rename_earlier(record: dict[str, Any]) -> dict[str, Any]:
    """The record under today's names. `credit/inert` has meant two things, so only whole records are renamed."""
    if "credit/w_mean" not in record:
        return record
    return {EARLIER_NAMES.get(name, name): value for name, value in record.items()}


def parsed(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def thin(records: list[dict[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    """At most MAX_POINTS records, evenly, and always those that hold an evaluation."""
    stride = math.ceil(len(records) / MAX_POINTS)
    if stride > 1:
        notes.append(f"curves show one in {stride} of {len(records)} steps, and every evaluation")
    return [r for i, r in enumerate(records) if i % stride == 0 or any(name.startswith("eval/") for name in r)]


def number(value: Any) -> float | int | None:
    """A figure at five significant digits; anything else becomes null."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


def read_traces(run_dir: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The traced steps in order, within the page's budget of tokens."""
    files = {step_of(path): path for path in (run_dir / "rollouts").glob("step_*.jsonl") if step_of(path) >= 0}
    steps = spread(sorted(files), MAX_STEPS)
    if len(steps) < len(files):
        notes.append(f"siblings of {len(steps)} of {len(files)} traced steps, evenly spread")
    shown = []
    for step in steps:
        try:
            groups = fit(read_step(files[step]), MAX_TOKENS // len(steps), step, notes)
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            notes.append(f"rollouts/{files[step].name} is damaged and left out")
            continue
        shown.append({"step": step, "groups": groups})
    return shown


def step_of(path: Path) -> int:
    text = path.stem.removeprefix("step_")
    return int(text) if text.isdecimal() else -1


def spread(items: list[int], n: int) -> list[int]:
    """`n` of `items`, evenly, with the first and the last."""
    if len(items) <= n:
        return items
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def fit(groups: list[dict[str, Any]], budget: int, step: int, notes: list[str]) -> list[dict[str, Any]]:
    """The groups of one step as the page holds them, whole groups up to `budget` tokens, at least one."""
    shown: list[dict[str, Any]] = []
    for group in groups:
        size = sum(len(s["ids"]) for s in group["siblings"][:MAX_SIBLINGS])
        if shown and size > budget:
            continue
        budget -= size
        shown.append(compact(group))
    if len(shown) < len(groups):
        notes.append(f"step {step}: {len(shown)} of {len(groups)} groups")
    return shown


def compact(group: dict[str, Any]) -> dict[str, Any]:
    siblings = group["siblings"]
    return {
        "task": group["task"],
        "reference": group["reference"],
        "info": group["reference_info"],
        "left_out": max(len(siblings) - MAX_SIBLINGS, 0),
        "prompt": clip(str(siblings[0]["prompt"])) if siblings else "",
        "siblings": [tokens(s, bool(group["reference"])) for s in siblings[:MAX_SIBLINGS]],
    }


def tokens(sibling: dict[str, Any], has_teacher: bool) -> dict[str, Any]:
    """One sibling: its tokens and their figures at four digits. Figures of an observed token mean nothing: null."""
    names = [n for n in SCORES if n in sibling and (has_teacher or n not in TEACHER)]
    own = sibling["generated"]
    columns = {n: [brief(v) if mine else None for v, mine in zip(sibling[n], own, strict=True)] for n in names}
    kept = {name: sibling[name] for name in ("reward", "stop", "pieces", "generated", "turns", "classes")}
    return {**kept, **columns}


def brief(value: Any) -> float | int | None:
    return value if not isinstance(value, float) else float(f"{value:.4g}")


def clip(text: str) -> str:
    return text if len(text) <= MAX_PROMPT else f"{text[:MAX_PROMPT]}\n[{len(text) - MAX_PROMPT} characters left out]"
