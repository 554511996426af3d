"""A training run: `Run.take_step` goes in one straight line from tasks to new weights.

An interrupted step leaves nothing behind: its results (metrics, rollouts, weights) are written at its end, and a
resumed run starts from the newest checkpoint with the records cut back to it. The checkpoint is written before the
evaluation, which is long and may fail, and holds the step's metrics: a resumed run evaluates and logs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer import engines, envs, randomness, stop_signals
from trainer.config import Config
from trainer.data import Group, Sampling, Scored
from trainer.errors import NotFinite, UserError
from trainer.evaluation import evaluate
from trainer.learning import model as policy
from trainer.learning.update import Learner
from trainer.preflight import config_file
from trainer.protocols import Engine, Renderer, Suite
from trainer.records import bug_reports, checkpoint, checkpoint_folder, rollout_files, run_records
from trainer.records.metric_logger import MetricLogger
from trainer.records.step_report import report_step
from trainer.references import writers
from trainer.rollout import rewards
from trainer.rollout.dynamic_sampling import Batch, sample_batch
from trainer.rollout.episode import RolloutSetup
from trainer.rollout.rewards import Grading
from trainer.rollout.siblings import EnvironmentMonitor, GroupSampler
from trainer.rollout.task_order import TaskOrder
from trainer.stage_clock import Clock
from trainer.step_guard import STOPS, StepGuard
from trainer.text import encodable

MAX_SKIPPED = 3  # updates in a row without a finite gradient: then the run stops


def train(config: Config) -> None:
    """Train by `config`, from the newest whole checkpoint of `output_dir` if there is one.

    Raises:
        Stopped: SIGINT, SIGTERM or SIGHUP came; a checkpoint of the last finished step is written.
    """
    stop_signals.run(Run.open(config).train())


@dataclass
class Run:
    """Everything that lives as long as the run."""

    config: Config
    model: Any
    tokenizer: Any
    renderer: Renderer
    suite: Suite
    engine: Engine
    writer: writers.Writer
    order: TaskOrder
    learner: Learner
    monitor: EnvironmentMonitor
    grading: Grading
    step: int = 0  # steps that are finished
    saved: tuple[int, Any] = (0, None)  # step and writer's state of the newest checkpoint
    unlogged: dict[str, float] = field(default_factory=dict)  # metrics of the checkpoint's step that were not written
    skipped: int = 0  # updates in a row
    warned_too_long: bool = False
    notes: list[str] = field(default_factory=list)  # to be shown when the logger is there

    @staticmethod
    def open(config: Config) -> Run:
        """Load the model, environment and engine of the config, and the newest checkpoint's state."""
        randomness.seed_all(config.seed)
        if config.top_p < 1:
            raise UserError(f"top_p: got {config.top_p:g}, training needs 1: a cut distribution biases the gradient")
        suite = envs.load(config.env.name, **config.env.options)
        for key, split in (("train_split", config.env.train_split), ("eval_split", config.env.eval_split)):
            envs.check_split(suite, key, split)
        model, tokenizer, renderer = policy.load(config.model)
        tasks = suite.tasks(config.env.train_split)
        run = Run(
            config,
            model,
            tokenizer,
            renderer,
            suite,
            engines.make(config, model, renderer),
            writers.load(config.writer, suite, renderer),
            TaskOrder(tasks, config.seed),
            Learner.of(config, model, renderer, suite),
            EnvironmentMonitor(len(tasks)),
            rewards.load(config.rewards, config.success_threshold),
        )
        run._resume()
        return run

    def _resume(self) -> None:
        """Continue from the newest whole checkpoint; records are cut back to it, and only to one that was loaded."""
        folder = self.config.output_dir
        checkpoint_folder.recover(folder)
        found = checkpoint_folder.found(folder)
        if found and not self.config.resume_from_checkpoint:
            raise UserError(f"output_dir: {folder} holds {found[-1].name}; resume, or choose another one")
        extra = self._load_newest(found)
        gone = checkpoint_folder.was_there(folder) or not (folder / "checkpoints").is_dir()
        if not self.step and gone and run_records.recorded(folder):
            raise UserError(
                f"output_dir: {folder} holds the records of a run whose checkpoints are gone; put one back as "
                f"{folder / 'checkpoints' / 'step_N'}, or choose another --output_dir"
            )
        last = run_records.rewind(folder, self.step or -1)
        if last < self.step:
            self.unlogged = extra.get("metrics", {})
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # from now on, records without it are an accident

    def _load_newest(self, found: list[Path]) -> dict[str, Any]:
        """Load the newest whole one of the checkpoints `found`, and give its `extra`; {} if there are none.

        Damaged ones that are newer lose their names, so that no later save counts them among the checkpoints.
        """
        damaged: list[checkpoint_folder.DamagedCheckpoint] = []
        for path in reversed(found):
            try:
                step, extra = checkpoint.load(
                    path,
                    model=self.model,
                    optimiser=self.learner.optimiser,
                    generators={"engine": self.engine.generator},
                )
            except checkpoint_folder.DamagedCheckpoint as error:
                damaged.append(error)
                continue
            config_file.refuse_difference(self.config, extra.get("config", {}), str(path))
            renamed = [f"{e.path.name} ({e.why}) is now {checkpoint_folder.set_aside(e.path).name}" for e in damaged]
            if renamed:
                self.notes.append(f"WARNING: resumes from {path}, the newest whole checkpoint: {', '.join(renamed)}")
            self.step = step
            self.order.load_state_dict(extra["order"])
            if "writer" in extra:
                self.writer.load_state_dict(extra["writer"])
            self.saved = self.step, self.writer.state_dict()
            checkpoint_folder.keep_newest(self.config.output_dir, self.config.save_total_limit)
            return extra
        if damaged:
            raise damaged[0]
        return {}

    async def train(self) -> None:
        """Run the remaining steps."""
        config = self.config
        with MetricLogger(
            config.output_dir,
            total_steps=config.max_steps,
            start_step=self.step,
            report_to=config.report_to,
            config=config.model_dump(mode="json"),
        ) as logger:
            for line in self.notes:
                logger.note(line)
            if self.step == 0 and config.eval_on_start:
                logger.log(0, await self.evaluate(logger, Clock()))
            if self.unlogged:
                await self.log(self.unlogged, logger)
            elif self.step and self.step >= config.max_steps:
                logger.note(f"nothing to do: {self.step} steps are finished, and max_steps is {config.max_steps}")
            while self.step < config.max_steps:
                stop_signals.check()
                metrics = await self.take_step(logger)
                if _due(self.step, config.save_steps, config.max_steps):
                    self.keep_checkpoint(metrics, logger)
                try:
                    await self.log(metrics, logger)
                except STOPS:  # in the evaluation: a resumed run repeats it
                    self.keep_checkpoint(metrics, logger)
                    raise

    async def take_step(self, logger: MetricLogger) -> dict[str, float]:
        """Tasks, siblings, reference, credit, update, new weights, reports.

        If it is stopped before the update, a checkpoint of the state at its start is left.
        """
        clock = Clock()
        guard = StepGuard(self.order, self.engine.generator, lambda: self.keep_checkpoint({}, logger))
        with guard:
            batch = await self.sample_siblings(clock, logger)
            await self.write_references(batch.train, clock)
        with self.engine_asleep():
            losses, scored = self.learner.update(batch.train, self.step + 1, clock)
            with guard:  # updates that were skipped have not moved the weights
                self.count_skipped(losses)
        self.step += 1
        self.engine.load_weights(self.model)
        self.write_rollouts(batch.train, scored, clock)
        metrics, warnings = report_step(self.config, self.step, batch, losses, scored, clock)
        for line in warnings:
            logger.note(line)
        return metrics

    async def sample_siblings(self, clock: Clock, logger: MetricLogger) -> Batch:
        """Sample siblings of the next tasks, until enough groups are mixed."""
        config = self.config
        sampling = Sampling(config.temperature, config.top_p, config.max_completion_length)
        setup = RolloutSetup(
            self.engine, self.suite, self.renderer, sampling, config.env, config.model.max_length, self.grading
        )
        with clock("rollout"), logger.track("sample siblings", config.groups_per_step) as advance:
            sample = GroupSampler(setup, config.num_generations, advance)
            batch = await sample_batch(
                sample,
                self.order,
                groups=config.groups_per_step,
                dynamic=config.dynamic_sample,
                max_resample_times=config.max_resample_times,
                monitor=self.monitor,
            )
            sample.check_that_some_fit()
        bug_reports.append(config.output_dir, self.step + 1, batch.bugs)
        if sample.too_long and not self.warned_too_long:
            logger.note(
                f"WARNING: a task is left out, like all that are too long (rollout/too_long): {sample.too_long[0]}"
            )
            self.warned_too_long = True
        return replace(batch, too_long=len(sample.too_long))

    async def write_references(self, groups: list[Group], clock: Clock) -> None:
        """Let the writer fill in the references, if the arm uses them."""
        if self.config.arm != "grpo":
            with clock("reference"):
                await self.writer.write(groups)
                for group in groups:
                    group.reference = encodable(group.reference)

    @contextmanager
    def engine_asleep(self) -> Iterator[None]:
        """Free the engine's memory for the update, if configured."""
        if not self.config.engine.vllm_enable_sleep_mode:
            yield
            return
        self.engine.sleep()
        yield
        self.engine.wake()

    def count_skipped(self, losses: dict[str, float]) -> None:
        """Raise `NotFinite` when update after update is skipped."""
        self.skipped = self.skipped + 1 if losses.get("update/skipped") else 0
        if self.skipped == MAX_SKIPPED:
            raise NotFinite(
                f"step {self.step + 1}: the gradient is not finite, {MAX_SKIPPED} times in a row; lower learning_rate, "
                "or set model.autocast to off"
            )

    def write_rollouts(self, groups: list[Group], scored: list[list[Scored]], clock: Clock) -> None:
        """Write the step's siblings, token by token, if the config asks for it."""
        config, step = self.config, self.step
        with clock("report"):
            if config.trace_steps and (step == 1 or _due(step, config.trace_steps, config.max_steps)):
                path = config.output_dir / run_records.TRACES / f"step_{step}.jsonl"
                rollout_files.write_step(path, groups, scored or None, self.renderer.pieces)
                run_records.keep_newest(config.output_dir, config.trace_total_limit)

    async def log(self, metrics: dict[str, float], logger: MetricLogger) -> None:
        """Log the step that was taken, with an evaluation where one is due."""
        if _due(self.step, self.config.eval_steps, self.config.max_steps):
            clock = Clock()
            metrics = {**metrics, **await self.evaluate(logger, clock), "time/eval": clock.wall["eval"]}
        logger.log(self.step, metrics)

    async def evaluate(self, logger: MetricLogger, clock: Clock) -> dict[str, float]:
        """Evaluate on the evaluation split. Caches are dropped afterwards: steps must not depend on it."""
        split = self.config.env.eval_split
        with clock("eval"), logger.track(f"evaluate {split}", self.suite.splits[split]) as advance:
            result = await evaluate.evaluate(self.engine, self.suite, self.renderer, self.config, advance=advance)
            self.engine.load_weights(self.model)
        bug_reports.append(self.config.output_dir, self.step, result.bugs)
        return result.metrics

    def keep_checkpoint(self, metrics: dict[str, float], logger: MetricLogger) -> None:
        """Write a checkpoint of the finished steps and of the tokens that the writer spent, unless there is one."""
        state = self.step, self.writer.state_dict()
        if self.step and state != self.saved:
            logger.note(f"checkpoint: {self.save(metrics)}")
            self.saved = state

    def save(self, metrics: dict[str, float]) -> Path:
        """Write the state that the next step starts from, and the metrics of this one, which are not logged yet."""
        return checkpoint.save(
            self.config.output_dir,
            self.step,
            model=self.model,
            optimiser=self.learner.optimiser,
            generators={"engine": self.engine.generator},
            extra={
                "order": self.order.state_dict(),
                "writer": self.writer.state_dict(),
                "metrics": metrics,
                "config": config_file.dump(self.config),
            },
            tokenizer=self.tokenizer,
            save_total_limit=self.config.save_total_limit,
        )


def _due(step: int, every: int, last: int) -> bool:
    """Every so many steps (0: never), and at the end."""
    return step == last or bool(every and step % every == 0)
