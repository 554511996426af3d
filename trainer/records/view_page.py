"""One page that shows a run: curves, siblings side by side, every token coloured by its credit.

The page is a single static file: the data stand in it as JSON, the script builds everything with `textContent`, and a
content policy that names the script by its hash forbids any other script and every network access. So neither a trace
that holds markup nor a tokenizer that does can run anything. Figures are shown as the run wrote them; what is left out
of a big run is listed at the top.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trainer import files, yaml_files
from trainer.data import TokenClass
from trainer.errors import UserError
from trainer.records.rollout_files import SCORES, read_step

ASSETS = Path(__file__).parents[1] / "assets" / "view"
SCRIPTS = ("elements", "curves", "siblings", "start")  # run in this order
MAX_TOKENS = 300_000  # embedded over the whole page: about 20 MB
MAX_STEPS = 24  # traced steps
MAX_POINTS = 500  # of a curve, which is 300 pixels wide
MAX_CURVES = 500
MAX_SIBLINGS = 16  # of one group
MAX_TEXT = 6_000  # characters of a prompt, a task or a reference
MAX_NOTES = 12
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
TASK_FIELDS = ("id", "env", "scenario", "class", "instruction")
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
Item = TypeVar("Item")
TEACHER = ("teacher_logp", "teacher_entropy")  # mean nothing where there was no teacher


Points = list[tuple[int, float | int]]


def write(run_dir: Path) -> Path:
    """Write `run_dir/view.html` from the run's metrics and traces, and return its path.

    `UserError` when the folder has no metrics yet.
    """
    notes: list[str] = []
    records = read_metrics(run_dir)
    data = {
        "title": run_dir.resolve().name,
        "config": read_config(run_dir),
        "curves": thin(curves(records), notes),
        "time_shares": thin(time_shares(records), notes),
        "steps": read_traces(run_dir, notes),
        "classes": [kind.name.lower().replace("_", " ") for kind in TokenClass],
        "notes": brief_list(notes),
    }
    page = run_dir / "view.html"
    files.write(page, render(data))
    return page


def render(data: dict[str, Any]) -> str:
    """Put data, style and script into the frame. In JSON, `<` is escaped: no text can end its element."""
    style, frame = ((ASSETS / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "html"))
    script = "\n".join((ASSETS / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
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
        config = yaml_files.read(run_dir / "config.yaml")
    except UserError:
        return {}
    wanted = ("arm", "env.name", "model.path", "writer.name", "credit.rule", "learning_rate", "num_generations", "seed")
    found = {name: lookup(config, name.split(".")) for name in wanted}
    return {name: clip(str(value), 200) for name, value in found.items() if value is not None}


def lookup(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = config.get(name) if isinstance(config, dict) else None
    return config


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that a killed run left unfinished is skipped."""
    path = run_dir / "metrics.jsonl"
    try:
        files.check_regular(path)
        with path.open(encoding="utf-8", errors="replace") as lines:
            records = [rename_earlier(record) for record in parsed(lines)]
    except OSError:
        records = []
    if not records:
        raise UserError(f"{path}: no metrics to show; give the run directory of a run that has finished a step")
    return records


def rename_earlier(record: dict[str, Any]) -> dict[str, Any]:
    """The record under today's names. `credit/inert` has meant two things, so only whole records are renamed."""
    if "credit/w_mean" not in record:
        return record
    return {EARLIER_NAMES.get(name, name): value for name, value in record.items()}


def parsed(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def curves(records: list[dict[str, Any]]) -> dict[str, Points]:
    """The (step, value) pairs of each metric, without those that are no number."""
    found: dict[str, Points] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and (figure := number(value)) is not None:
                found.setdefault(name, []).append((record["step"], figure))
    return found


def time_shares(records: list[dict[str, Any]]) -> dict[str, Points]:
    """What share of each step every stage took; `time/sgcd_overhead` is a share already and no stage."""
    stages = sorted({name for r in records for name in r if name.startswith("time/") and name != "time/sgcd_overhead"})
    found: dict[str, Points] = {stage: [] for stage in stages}
    for record in records:
        seconds = {stage: number(record.get(stage)) or 0.0 for stage in stages}
        if (total := sum(seconds.values())) > 0:
            for stage in stages:
                found[stage].append((record["step"], number(seconds[stage] / total) or 0.0))
    return found


def thin(found: dict[str, Points], notes: list[str]) -> dict[str, Points]:
    """At most MAX_CURVES curves of at most MAX_POINTS points each, evenly spread, with the first and the last."""
    longest = max(map(len, found.values()), default=0)
    if longest > MAX_POINTS:
        notes.append(f"curves of up to {longest} points show {MAX_POINTS} of them, evenly spread")
    if len(found) > MAX_CURVES:
        notes.append(f"{MAX_CURVES} of {len(found)} metrics")
    return {clip(name, 200): spread(found[name], MAX_POINTS) for name in sorted(found)[:MAX_CURVES]}


def number(value: Any) -> float | int | None:
    """A figure at five significant digits; anything else, and what a float cannot hold, becomes None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        if not math.isfinite(value):
            return None
    except OverflowError:
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


def read_traces(run_dir: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The traced steps in order, within the page's budget of tokens."""
    files = {step_of(path): path for path in (run_dir / "rollouts").glob("step_*.jsonl") if step_of(path) >= 0}
    steps = choose_steps(files)
    if len(steps) < len(files):
        notes.append(f"siblings of {len(steps)} of {len(files)} traced steps, evenly spread")
    shown = []
    for step in steps:
        try:
            groups = read_groups(files[step], MAX_TOKENS // len(steps), step, notes)
        except UNREADABLE:
            notes.append(f"rollouts/{files[step].name} is damaged and left out")
            continue
        shown.append({"step": step, "groups": groups})
    return shown


def choose_steps(files: dict[int, Path]) -> list[int]:
    """As many steps, evenly spread, as the page can show with a whole group each; always the last one."""
    read_size = functools.cache(first_group_size)
    for count in range(min(MAX_STEPS, len(files)), 1, -1):
        steps = spread(sorted(files), count)
        if sum(read_size(files[step]) for step in steps) <= MAX_TOKENS:
            return steps
    return sorted(files)[-1:]


def first_group_size(path: Path) -> int:
    """Tokens of the first group of a trace; 0 where it cannot be read."""
    try:
        return next((size(group) for group in read_step(path)), 0)
    except UNREADABLE:
        return 0


def step_of(path: Path) -> int:
    text = path.stem.removeprefix("step_")
    return int(text) if text.isdecimal() else -1


def spread(items: list[Item], n: int) -> list[Item]:
    """`n` of `items`, evenly, with the first and the last; for `n` below 2 the last."""
    if len(items) <= n:
        return items
    if n < 2:
        return items[-1:]
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def read_groups(path: Path, budget: int, step: int, notes: list[str]) -> list[dict[str, Any]]:
    """The groups of one step as the page holds them: whole groups up to `budget` tokens; the first one, cut to it."""
    shown: list[dict[str, Any]] = []
    total = 0
    for group in read_step(path):
        total += 1
        needed = size(group)
        if shown and needed > budget:
            continue
        shown.append(compact(group, budget))
        budget -= needed
    if len(shown) < total:
        notes.append(f"step {step}: {len(shown)} of {total} groups")
    return shown


def size(group: dict[str, Any]) -> int:
    return sum(len(s["ids"]) for s in group["siblings"][:MAX_SIBLINGS])


def compact(group: dict[str, Any], budget: int) -> dict[str, Any]:
    """A group as the page holds it, its siblings as far as `budget` tokens reach and at least the first."""
    siblings = group["siblings"]
    shown: list[dict[str, Any]] = []
    for sibling in siblings[:MAX_SIBLINGS]:
        if shown and len(sibling["ids"]) > budget:
            break
        shown.append(tokens(sibling, bool(group["reference"]), MAX_TOKENS))
        budget -= len(sibling["ids"])
    return {
        "task": {name: clip(str(group["task"][name])) for name in TASK_FIELDS},
        "reference": clip(str(group["reference"] or "")),
        "info": {str(k): clip(str(v)) if isinstance(v, str) else v for k, v in group["reference_info"].items()},
        "left_out": len(siblings) - len(shown),
        "prompt": clip(str(siblings[0]["prompt"])) if siblings else "",
        "siblings": shown,
    }


def tokens(sibling: dict[str, Any], has_teacher: bool, limit: int) -> dict[str, Any]:
    """One sibling: its first `limit` tokens and their figures at four digits, null where the token was observed."""
    names = [n for n in SCORES if n in sibling and (has_teacher or n not in TEACHER)]
    own = sibling["generated"][:limit]
    columns = {n: [brief(v) if mine else None for v, mine in zip(sibling[n][:limit], own, strict=True)] for n in names}
    lists = {n: sibling[n][:limit] for n in ("pieces", "generated", "turns", "classes")}
    if len({len(column) for column in (*lists.values(), *columns.values())}) != 1:
        raise ValueError("the lists of a sibling differ in length")
    return {
        "reward": number(sibling["reward"]),
        "success": bool(sibling.get("success", sibling["reward"] >= 1)),  # older traces have none
        "components": {clip(str(k), 80): number(v) for k, v in sibling.get("components", {}).items()},
        "reason": clip(str(sibling.get("reason", "")), 300),
        "stop": clip(str(sibling["stop"] or "")),
        "cut": len(sibling["generated"]) - len(own),
        **lists,
        **columns,
    }


def brief(value: Any) -> float | int | None:
    return value if not isinstance(value, float) else float(f"{value:.4g}")


def clip(text: str, limit: int = MAX_TEXT) -> str:
    return text if len(text) <= limit else f"{text[:limit]}\n[{len(text) - limit} characters left out]"


def brief_list(notes: list[str]) -> list[str]:
    return notes if len(notes) <= MAX_NOTES else [*notes[:MAX_NOTES], f"{len(notes) - MAX_NOTES} more notes"]
