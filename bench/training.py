"""`python -m bench train`: tokens per second, the share of each stage in a step, what SGCD adds to GRPO.

Task workday is the embedded world with all its turns; task first_call is one turn of it (`bench.first_call`), where
TRL's GRPOTrainer is the peer. The first step warms up and is not counted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import torch

from bench import results
from bench.cases import UserError, check_names
from bench.providers import describe_failure, version
from bench.report import STAGES
from bench.results import OK, TrainingRow
from bench.timing import OtherLoad

CONFIG = Path("configs/workday_sgcd.yaml")


def measure_trainers(providers: Sequence[str], steps: int, folder: Path) -> int:
    """Measure each trainer, print and write its row."""
    check_names("provider", providers, [f"{task}/{name}" for task, name in RUNS])
    if steps < 1:
        raise UserError(f"--steps: got {steps}, needs at least 1")
    for (task, name), measure in RUNS.items():
        if providers and f"{task}/{name}" not in providers:
            continue
        row = _blank_row(task, name)
        load = OtherLoad()
        try:
            with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
                measure(row, steps, Path(scratch))
            row.others = load.cores() if not torch.cuda.is_available() else None
            row.threads = torch.get_num_threads()
        except Exception as error:
            row.status = describe_failure(error)
        results.append([row], folder)
        print(f"{task}/{name}: {_describe(row)}", flush=True)
    return 0


def _describe(row: TrainingRow) -> str:
    if row.status != OK:
        return row.status
    shares = ", ".join(f"{stage} {getattr(row, f'{stage}_share') or 0:.0%}" for stage in STAGES)
    rates = f"rollout {row.rollout_tokens_per_s:.0f} tokens/s, update {row.update_tokens_per_s:.0f} tokens/s"
    return f"{row.seconds_per_step:.2f} s per step; {rates}; {shares}"


def ours(arm: str, first_call: bool) -> Callable[[TrainingRow, int, Path], None]:
    """This repository's trainer."""

    def measure(row: TrainingRow, steps: int, folder: Path) -> None:
        found = asyncio.run(_take_steps(arm, first_call, steps, folder))
        row.version = version("sgcd-kernels")
        stages = {name: fmean(step.get(f"time/{name}", 0.0) for step in found) for name in STAGES}
        total = sum(stages.values())
        tokens = fmean(step["bench/tokens"] for step in found)
        trained = fmean(step["bench/trained"] for step in found)
        rates = (tokens / stages["rollout"], trained / stages["update"])
        _fill(row, steps, total, rates, {n: s / total for n, s in stages.items() if s})
        if arm == "sgcd":
            row.sgcd_overhead = fmean(step["time/sgcd_overhead"] for step in found)

    return measure


async def _take_steps(arm: str, first_call: bool, steps: int, folder: Path) -> list[dict[str, float]]:
    from trainer import loop
    from trainer.data import Group
    from trainer.preflight import config_file
    from trainer.records.metric_logger import MetricLogger
    from trainer.rollout.task_order import TaskOrder
    from trainer.stage_clock import Clock

    options = ["--arm", arm, "--output_dir", str(folder / "run"), "--trace_steps", "0", "--max_steps", str(steps + 1)]
    config = config_file.load(CONFIG, [*options, *(["--dynamic_sample", "false"] if first_call else [])])
    run = loop.Run.open(config)
    if first_call:
        from bench.first_call import FirstCallSuite

        run.suite = FirstCallSuite()
        run.learner = dataclasses.replace(run.learner, suite=run.suite)
        run.order = TaskOrder(run.suite.tasks(config.env.train_split), config.seed)
    trained: list[Sequence[Group]] = []
    update = run.learner.update

    def watched(groups: Sequence[Group], step: int, clock: Clock) -> object:
        trained.append(groups)
        return update(groups, step, clock)

    object.__setattr__(run.learner, "update", watched)
    found = []
    with MetricLogger(folder / "run", total_steps=steps + 1) as logger:
        for _ in range(steps + 1):
            trained.clear()
            step = await run.take_step(logger)
            loss_tokens = sum(sum(r.generated) for groups in trained for g in groups for r in g.rollouts)
            sampled = step["perf/rollout_tokens_per_s"] * step["time/rollout"]
            found.append({**step, "bench/tokens": sampled, "bench/trained": float(loss_tokens)})
    return found[1:]


def trl(row: TrainingRow, steps: int, folder: Path) -> None:
    """TRL's GRPOTrainer; all time that is not generation counts as update."""
    from bench import first_call
    from trainer.preflight import config_file

    row.version = version("trl")
    config = config_file.load(CONFIG, ["--arm", "grpo", "--output_dir", str(folder / "run")])
    clock = first_call.train_with_trl(config, steps + 1, folder)
    total, rollout = fmean(clock.steps[1:]), fmean(clock.rollouts[1:])
    tokens = fmean(clock.tokens[1:])
    rates = (tokens / rollout, tokens / (total - rollout))
    _fill(row, steps, total, rates, {"rollout": rollout / total, "update": 1 - rollout / total})


def _fill(row: TrainingRow, steps: int, total: float, rates: tuple[float, float], shares: dict[str, float]) -> None:
    row.steps, row.seconds_per_step = steps, total
    row.rollout_tokens_per_s, row.update_tokens_per_s = rates
    for stage, share in shares.items():
        setattr(row, f"{stage}_share", share)


def _blank_row(task: str, name: str) -> TrainingRow:
    return TrainingRow(
        task=task,
        provider=name,
        device=results.device_name("cuda" if torch.cuda.is_available() else "cpu"),
        torch=torch.__version__,
        transformers=version("transformers"),
        sha=results.commit(),
        date=results.now(),
    )


RUNS: dict[tuple[str, str], Callable[[TrainingRow, int, Path], None]] = {
    ("first_call", "ours-grpo"): ours("grpo", first_call=True),
    ("first_call", "trl-grpo"): trl,
    ("workday", "ours-grpo"): ours("grpo", first_call=False),
    ("workday", "ours-sgcd"): ours("sgcd", first_call=False),
}
