"""A training run: one step is one straight line from tasks to new weights.

A step that was interrupted never happened: what a step leaves behind (metrics, traces, weights) is written at its end,
and a resumed run starts from the newest checkpoint with the records cut back to it. The checkpoint is written before
the evaluation, which is long and may fail, and holds the step's metrics: a resumed run evaluates and logs them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint, engines, envs, evaluate, metrics, sampling, traces, update
from trainer import model as policy
from trainer.clock import Clock
from trainer.config import Config
from trainer.credit import writers
from trainer.reporting import MetricLogger
from trainer.rollout import PromptTooLong, Pulse, run_group
from trainer.types import Engine, Group, Renderer, Sampling, Suite, Task, UserError


def train(config: Config) -> None:
    """Train as `config` says, from the newest checkpoint of `output_dir` if there is one."""
    asyncio.run(Run.open(config).train())


DRIFTED = 0.1  # mean difference of log-probs, in nats; bf16 makes some hundredths, other weights make more
MAX_SKIPPED = 3  # updates in a row without a finite gradient: then the run stops
STOPS = (UserError, asyncio.CancelledError, KeyboardInterrupt)  # what ends a run in order: Ctrl-C cancels


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
    order: sampling.TaskOrder
    learner: update.Learner
    pulse: Pulse
    step: int = 0  # steps that are finished
    saved: tuple[int, Any] = (0, None)  # step and writer's state of the newest checkpoint
    unlogged: dict[str, float] = field(default_factory=dict)  # metrics of the checkpoint's step that were not written
    skipped: int = 0  # updates in a row
    told_too_long: bool = False

    @staticmethod
    def open(config: Config) -> Run:
        """Load what the config names, and the state of the newest checkpoint."""
        torch.manual_seed(config.seed)
        if config.top_p < 1:
            raise UserError(f"top_p: got {config.top_p:g}, training needs 1: a cut distribution biases the gradient")
        suite = envs.load(config.env.name, **config.env.options)
        for key, split in (("train_split", config.env.train_split), ("eval_split", config.env.eval_split)):
            evaluate.check_split(suite, key, split)
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
            sampling.TaskOrder(tasks, config.seed),
            update.Learner.of(config, model, renderer, suite),
            Pulse(len(tasks)),
        )
        run._resume()
        return run

    def _resume(self) -> None:
        folder, extra = self.config.output_dir, dict[str, Any]()
        newest = checkpoint.latest(folder)
        if newest and not self.config.resume_from_checkpoint:
            raise UserError(f"output_dir: {folder} holds {newest.name}; resume, or choose another one")
        if not (folder / "checkpoints").is_dir() and checkpoint.recorded(folder):
            raise UserError(
                f"output_dir: {folder} holds the records of a run whose checkpoints are gone; choose another one, or "
                "remove that folder"
            )
        if newest:
            self.step, extra = checkpoint.load(
                newest,
                model=self.model,
                optimiser=self.learner.optimiser,
                generators={"engine": self.engine.generator},
            )
            self.order.load_state_dict(extra["order"])
            if "writer" in extra:
                self.writer.load_state_dict(extra["writer"])
            self.saved = self.step, self.writer.state_dict()
        last = checkpoint.rewind(folder, self.step if newest else -1)
        if last < self.step:
            self.unlogged = extra.get("metrics", {})
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # from now on, records without it are an accident

    async def train(self) -> None:
        """Take the steps that are left."""
        config = self.config
        with MetricLogger(
            config.output_dir,
            total_steps=config.max_steps,
            start_step=self.step,
            report_to=config.report_to,
            config=config.model_dump(mode="json"),
        ) as logger:
            if self.step == 0 and config.eval_on_start:
                logger.log(0, await self.evaluate(logger, Clock()))
            if self.unlogged:
                await self.report(self.unlogged, logger)
            elif self.step and self.step >= config.max_steps:
                logger.say(f"nothing to do: {self.step} steps are finished, and max_steps is {config.max_steps}")
            while self.step < config.max_steps:
                found = await self.take_step(logger)
                if _due(self.step, config.save_steps, config.max_steps):
                    self.keep(found, logger)
                try:
                    await self.report(found, logger)
                except STOPS:  # in the evaluation: a resumed run makes it again
                    self.keep(found, logger)
                    raise

    async def report(self, found: dict[str, float], logger: MetricLogger) -> None:
        """Log the step that was taken, with an evaluation where one is due."""
        if _due(self.step, self.config.eval_steps, self.config.max_steps):
            clock = Clock()
            found = {**found, **await self.evaluate(logger, clock), "time/eval": clock.wall["eval"]}
        logger.log(self.step, found)

    async def take_step(self, logger: MetricLogger) -> dict[str, float]:
        """Tasks, siblings, reference, credit, update, new weights, reports.

        What stops it before the update leaves a checkpoint of the state that the step started from.
        """
        config, clock, step = self.config, Clock(), self.step + 1
        position, drawn = self.order.state_dict(), self.engine.generator.get_state()
        try:
            with clock("rollout"):
                batch, too_long = await self.collect(logger)
            if config.arm != "grpo":
                with clock("reference"):
                    await self.writer.write(batch.train)
        except STOPS:
            self.undo(position, drawn, logger)
            raise
        if sleeps := config.engine.vllm_enable_sleep_mode:
            self.engine.sleep()
        found = {**metrics.rollout_metrics(batch.sampled), **batch.metrics(), "rollout/too_long": float(too_long)}
        scored: list[list[metrics.Scored]] = []
        if batch.train:
            losses, scored = self.learner.update(batch.train, step, clock)
            try:
                self.count_skipped(bool(losses["update/skipped"]), logger)
            except UserError:  # the weights have not moved
                self.undo(position, drawn, logger)
                raise
            if losses["sampling/sampling_logp_difference/mean"] > DRIFTED:
                logger.say(f"WARNING: step {step}: engine and trainer differ in their log-probs; has it these weights?")
            found |= losses | self.credit_metrics(batch.train, scored, logger)
        else:
            logger.say(f"step {step}: no group is mixed, nothing to learn from; raise max_resample_times or the tasks")
        self.step = step
        if sleeps:
            self.engine.wake()
        self.engine.load_weights(self.model)
        with clock("report"):
            if config.trace_steps and (step == 1 or _due(step, config.trace_steps, config.max_steps)):
                path = Path(config.output_dir) / "rollouts" / f"step_{step}.jsonl"
                traces.write_step(path, batch.train, scored or None, self.renderer.pieces)
        times = clock.metrics()
        if config.arm == "grpo":
            del times["time/sgcd_overhead"]
        tokens = sum(len(r.ids) for g in batch.sampled for r in g.rollouts)
        return {**found, **times, "perf/rollout_tokens_per_s": tokens / clock.wall["rollout"]}

    def undo(self, position: Any, drawn: torch.Tensor, logger: MetricLogger) -> None:
        """Go back to where the step began, and leave a checkpoint of that."""
        self.order.load_state_dict(position)
        self.engine.generator.set_state(drawn)
        self.keep({}, logger)

    def count_skipped(self, skipped: bool, logger: MetricLogger) -> None:
        """Say that an update was left out; a `UserError` when it keeps happening."""
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped == MAX_SKIPPED:
            raise UserError(
                f"step {self.step + 1}: the gradient is not finite, {MAX_SKIPPED} times in a row; lower learning_rate, "
                "or set model.autocast to off"
            )
        if skipped:
            logger.say(f"WARNING: step {self.step + 1}: the gradient is not finite, the weights stay as they are")

    async def collect(self, logger: MetricLogger) -> tuple[sampling.Batch, int]:
        """Siblings of the next tasks, until enough groups are mixed; and how many tasks were too long to play."""
        config = self.config
        drawn = Sampling(config.temperature, config.top_p, config.max_completion_length)
        tasks, too_long = 0, list[PromptTooLong]()
        with logger.track("sample siblings", config.groups_per_step) as advance:

            async def sample(task: Task) -> tuple[Group, int]:
                nonlocal tasks
                tasks += 1
                length, n = config.model.max_length, config.num_generations
                try:
                    return await run_group(self.engine, self.suite, self.renderer, task, drawn, config.env, length, n)
                except PromptTooLong as error:
                    too_long.append(error)
                    return Group(task, []), 0
                finally:
                    advance(1)

            batch = await sampling.collect(
                sample,
                self.order,
                groups=config.groups_per_step,
                dynamic=config.dynamic_sample,
                max_resample_times=config.max_resample_times,
                pulse=self.pulse,
            )
        if too_long and len(too_long) == tasks:
            raise too_long[0]
        if too_long and not self.told_too_long:
            logger.say(f"WARNING: a task is left out, and so will be all like it (rollout/too_long): {too_long[0]}")
            self.told_too_long = True
        return batch, len(too_long)

    def credit_metrics(
        self, groups: list[Group], scored: list[list[metrics.Scored]], logger: MetricLogger
    ) -> dict[str, float]:
        """What the references did; a step whose credit cannot be right says so where it cannot be missed."""
        entropy = update.mean_entropy(scored)
        if self.config.arm == "grpo":
            return entropy
        taught = [s for group, row in zip(groups, scored) if group.reference for s in row]
        problem = update.invalid_credit(groups, scored, self.config)
        if problem:
            logger.say(f"WARNING: step {self.step + 1} is invalid: {problem}")
        elif scarce := update.scarce_references(groups, self.config):
            logger.say(f"WARNING: step {self.step + 1}: {scarce}")
        return {
            **metrics.credit_metrics(taught, self.config.credit.clip),
            **entropy,
            **metrics.reference_metrics(groups),
            "credit/invalid": float(bool(problem)),
        }

    async def evaluate(self, logger: MetricLogger, clock: Clock) -> dict[str, float]:
        """Success on the evaluation split. Caches are dropped after it: a step must not depend on what came before."""
        split = self.config.env.eval_split
        with clock("eval"), logger.track(f"evaluate {split}", self.suite.splits[split]) as advance:
            result = await evaluate.evaluate(self.engine, self.suite, self.renderer, self.config, advance=advance)
            self.engine.load_weights(self.model)
        return result.metrics

    def keep(self, found: dict[str, float], logger: MetricLogger) -> None:
        """See to it that there is a checkpoint of the finished steps, and of what the writer has spent since."""
        state = self.step, self.writer.state_dict()
        if self.step and state != self.saved:
            logger.say(f"checkpoint: {self.save(found)}")
            self.saved = state

    def save(self, found: dict[str, float]) -> Path:
        """Write the state that the next step starts from, and the metrics of this one, which are not logged yet."""
        return checkpoint.save(
            self.config.output_dir,
            self.step,
            model=self.model,
            optimiser=self.learner.optimiser,
            generators={"engine": self.engine.generator},
            extra={"order": self.order.state_dict(), "writer": self.writer.state_dict(), "metrics": found},
            tokenizer=self.tokenizer,
            save_total_limit=self.config.save_total_limit,
        )


def _due(step: int, every: int, last: int) -> bool:
    """Every so many steps (0: never), and at the end."""
    return step == last or bool(every and step % every == 0)
