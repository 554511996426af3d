"""The rollouts of one step on disk: `rollouts/step_N.jsonl`, one line per group, read by `view` and by people.

A line is {"schema", "task": {id, env, split, scenario, class, instruction}, "reference", "reference_info", "siblings"};
a sibling is {"reward", "success", "components" (of the reward, by name), "reason" (of a failure), "stop", "messages",
"prompt", "pieces", "ids", "generated", "turns", "classes", "logprobs"} and, when it was scored, {"student_logp",
"teacher_logp", "student_entropy", "teacher_entropy", "d", "W", "s", "span"}: lists that run parallel to `ids`, where a
`span` of -1 means none. Task data and verifier details stay out: files are shared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer import files
from trainer.data import Group, Rollout

SCHEMA = 1
# Field of the trace <- field of `metrics.Scored`.
SCORES = {
    "student_logp": "student_logp",
    "teacher_logp": "teacher_logp",
    "student_entropy": "student_entropy",
    "teacher_entropy": "teacher_entropy",
    "d": "divergence",
    "W": "weights",
    "s": "saliency",
    "span": "span_ids",
}

Pieces = Callable[[Sequence[int]], list[str]]


def write_step(path: Path, groups: Sequence[Group], scored: Sequence[Sequence[Any]] | None, pieces: Pieces) -> None:
    """Write the groups of one step, whole or not at all.

    `scored[g][i]` holds the 1-D tensors of rollout i of group g, aligned with its `ids` (attributes named in `SCORES`),
    or None where it was not scored. `pieces` gives the text of each token (`renderer.pieces`).
    """
    with files.replacing(path) as out:
        for g, group in enumerate(groups):
            record = describe(group, scored[g] if scored else [None] * len(group.rollouts), pieces)
            out.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def read_step(path: Path) -> Iterator[dict[str, Any]]:
    """Read what `write_step` wrote, group by group: a step of long rollouts is larger than memory should hold."""
    files.check_regular(path)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line, parse_constant=lambda _: None)


def describe(group: Group, scored: Sequence[Any], pieces: Pieces) -> dict[str, Any]:
    task = group.task
    return {
        "schema": SCHEMA,
        "task": {
            "id": task.id,
            "env": task.env,
            "split": task.split,
            "scenario": task.scenario,
            "class": task.task_class,
            "instruction": task.instruction,
        },
        "reference": group.reference,
        "reference_info": group.reference_info,
        "siblings": [sibling(r, s, pieces) for r, s in zip(group.rollouts, scored, strict=True)],
    }


def sibling(rollout: Rollout, scores: Any, pieces: Pieces) -> dict[str, Any]:
    record: dict[str, Any] = {
        "reward": rollout.reward,
        "success": rollout.success,
        "components": dict(rollout.components),
        "reason": rollout.reason,
        "stop": rollout.stop,
        "messages": rollout.messages,
        "prompt": "".join(pieces(rollout.prompt_ids)),
        "pieces": pieces(rollout.ids),
        "ids": rollout.ids,
        "generated": [int(own) for own in rollout.generated],
        "turns": rollout.turns,
        "classes": [int(c) for c in rollout.classes],
        "logprobs": numbers(rollout.logprobs),
    }
    if scores is not None:
        record |= {name: numbers(getattr(scores, source).tolist()) for name, source in SCORES.items()}
    return record


def numbers(values: Iterable[float]) -> list[float | int | None]:
    """Round for readability; nan and inf become null, so that the file is valid JSON."""
    return [v if isinstance(v, int) else round(v, 6) if math.isfinite(v) else None for v in values]
