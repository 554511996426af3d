"""The costs of a run: memory, disk, tokens of other language models, hours. docs/paper.md derives them.

The figures are upper bounds: every row has the maximum length, and every step resamples the maximum number of times.
Hours come only from measured steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from trainer.preflight.memory_footprint import FP32, Facts, Memory, Part, engine_memory, size

if TYPE_CHECKING:
    from trainer.config import Config

CHECKPOINT = 3 * FP32  # bytes per trained parameter: the weight and Adam's two moments
TRACE = 130  # bytes per token in rollouts/*.jsonl, scores included: 113 were measured in workday, docs/paper.md
METRICS = (
    8_000  # bytes per step in metrics.jsonl, which keeps every step: 5,547 were measured in workday, 7,006 at most
)
CHARS_PER_TOKEN = 3  # a low estimate; the writer reserves a token per byte and gives back what it did not use
SCENARIO = 2_000  # tokens of a user simulator's instructions, the benchmark's guidelines included
STEP_TIMES = Path(__file__).parents[1] / "assets" / "step_times.json"  # made by scripts/record_step_times.py


def report(config: Config, model: Facts, found: Memory, split: int) -> list[str]:
    """The lines that `check` prints. `split`: tasks that an evaluation plays, 0 if unknown."""
    on = config.model.gradient_checkpointing
    other = f"activations {'without' if on else 'with'} model.gradient_checkpointing: "
    other += size(found.without_checkpointing if on else found.with_checkpointing)
    lines = [
        _line("the trainer's device", size(found.total), "at its fullest moment"),
        *_parts([*found.lasting, *found.passing]),
        _line("", "", other),
    ]
    if config.engine.name == "vllm":
        parts = engine_memory(config, model)
        lines.append(_line("a vLLM server's device", _sum(parts), "for all slots at once; what does not fit queues"))
        lines += _parts(parts)
    parts = disk(config, model)
    lines += [_line("disk", _sum(parts), "in output_dir"), *_parts(parts)]
    tokens = llm_tokens(config, split)
    lines += [_line("LLM tokens", f"{t.count / 1e6:,.1f} M", f"{t.name}: {t.how}") for t in tokens]
    timed = measured(config)
    return [*lines, _line("time", *(hours(config, timed) if timed else ("unknown", NOT_MEASURED)))]


NOT_MEASURED = "no step like this one was measured; after the first steps of a run, `check` reads them here"


def _parts(parts: Sequence[Part]) -> list[str]:
    return [_line(f"  {p.name}", size(p.size), p.how) for p in parts]


def _sum(parts: Sequence[Part]) -> str:
    return size(sum(p.size for p in parts))


def _line(name: str, amount: str, how: str) -> str:
    return f"  {name:<24}{amount:>11}  {how}".rstrip()


def disk(config: Config, model: Facts) -> list[Part]:
    """What `output_dir` grows to, at most."""
    kept = config.save_total_limit + 1  # one is being written while the others are there
    parts = [Part("checkpoints", kept * CHECKPOINT * model.trained, f"{kept} x 12 B x trained: weights and moments")]
    if config.engine.name == "vllm":
        parts.append(
            Part("engine weights", FP32 * (model.parameters + model.head * model.tied), "4 B x parameters, head untied")
        )
    if config.trace_steps:
        steps = len({1, config.max_steps, *range(config.trace_steps, config.max_steps + 1, config.trace_steps)})
        steps = min(steps, config.trace_total_limit)
        tokens = steps * config.groups_per_step * config.num_generations * longest(config)
        parts.append(Part("traces", TRACE * tokens, f"{steps} steps x {tokens // steps:,} tokens x {TRACE} B"))
    parts.append(Part("metrics", METRICS * config.max_steps, f"{config.max_steps:,} steps x {METRICS:,} B"))
    return parts


def longest(config: Config) -> int:
    """Tokens that an episode may have after its prompt."""
    return min(config.model.max_length, config.env.max_response_tokens or config.model.max_length)


@dataclass(frozen=True)
class Tokens:
    """Tokens of another language model, at most."""

    name: str
    count: float
    how: str


def llm_tokens(config: Config, split: int) -> list[Tokens]:
    """What the writer and a user simulator may use. `split`: tasks that an evaluation plays."""
    out: list[Tokens] = []
    if config.arm != "grpo" and config.writer.name == "openai":
        each = config.writer.max_prompt_chars // CHARS_PER_TOKEN + config.writer.max_tokens
        calls = config.max_steps * config.groups_per_step
        limit = config.writer.token_budget or math.inf
        how = f"{calls:,} references x {each:,}" + (", cut by token_budget" if calls * each > limit else "")
        out.append(Tokens(f"writer, {config.writer.model}", min(calls * each, limit), how))
    if config.env.options.get("user_base_url"):
        played = evaluations(config) * split * (config.eval_samples + 1)  # + 1: the refuser
        least, most = (rollouts + played for rollouts in sampled(config))
        calls = config.env.max_turns + 1  # it opens, and answers each turn that is no call of a tool
        each = SCENARIO + longest(config) // 2  # the transcript grows, evenly say
        how = f"{most:,} conversations ({least:,} if every group is mixed) x {calls} calls x {each:,}"
        out.append(Tokens(f"user simulator, {config.env.options.get('user_model')}", most * calls * each, how))
    return out


def sampled(config: Config) -> tuple[int, int]:
    """Rollouts of a run: if no step resamples, and if every step does as often as it may."""
    least = config.max_steps * config.groups_per_step * config.num_generations
    if not config.dynamic_sample:
        return least, least
    return least, 2 * least * (1 + config.max_resample_times)  # a round asks for twice the groups at most


def evaluations(config: Config) -> int:
    last = config.max_steps
    steps = {last, *range(config.eval_steps, last + 1, config.eval_steps)} if config.eval_steps else {last}
    return len(steps) + int(config.eval_on_start)


@dataclass(frozen=True)
class Measured:
    """Seconds per step, and where they were measured."""

    seconds: float
    where: str
    evaluation: float | None = None  # seconds of one, where that was measured too


def measured(config: Config) -> Measured | None:
    """The run's own steps, else the recorded benchmark of the same environment and arm, else nothing."""
    return _of_run(config.output_dir) or _recorded(config)


def _of_run(folder: Path) -> Measured | None:
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    stages = ("rollout", "reference", "score", "credit", "update", "report")
    steps = [sum(line.get(f"time/{s}") or 0.0 for s in stages) for line in lines if "time/rollout" in line]
    played = [line["time/eval"] for line in lines if line.get("time/eval")]
    if not steps:
        return None
    return Measured(fmean(steps), f"{len(steps)} steps of {folder}", fmean(played) if played else None)


def _recorded(config: Config) -> Measured | None:
    if config.model.path != type(config.model)().path:  # the benchmark trains the embedded policy
        return None
    for row in json.loads(STEP_TIMES.read_text(encoding="utf-8")):
        if (row["env"], row["arm"]) == (config.env.name, config.arm):
            return Measured(row["seconds_per_step"], f"{row['device']}, {row['date']}")
    return None


def hours(config: Config, found: Measured) -> tuple[str, str]:
    """How long the run takes, and how that is known."""
    total = found.seconds * config.max_steps
    how = f"{config.max_steps} steps of {found.seconds:.3g} s, as measured ({found.where})"
    if found.evaluation is not None:
        total += found.evaluation * evaluations(config)
        how += f", {evaluations(config)} evaluations of {found.evaluation:.3g} s"
    else:
        how += ", evaluations not counted"
    return (f"{total / 3600:.3g} h" if total >= 3600 else f"{total / 60:.3g} min"), how
