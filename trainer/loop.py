"""A training run: one step is one straight line from tasks to new weights.

A step that was interrupted never happened: what a step leaves behind (metrics, traces, weights) is written at its end,
and a resumed run starts from the newest checkpoint with the records cut back to it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import checkpoint, envs, evaluate, metrics, sampling, traces, update
from trainer import model as policy
from trainer.clock import Clock
from trainer.config import Config
from trainer.credit import writers
from trainer.engines.hf import HFEngine
from trainer.reporting import MetricLogger
from trainer.rollout import run_group
from trainer.types import Group, Renderer, Sampling, Suite, Task, UserError


def train(config: Config) -> None:
    """Train as `config` says, from the newest checkpoint of `output_dir` if there is one."""
    asyncio.run(Run.open(config).train())


@dataclass
class Run:
    """Everything that lives as long as the run."""

    config: Config
    model: Any
    tokenizer: Any
    renderer: Renderer
    suite: Suite
    engine: HFEngine
    writer: writers.Writer
    order: sampling.TaskOrder
    learner: update.Learner
    step: int = 0  # steps that are finished

    @staticmethod
    def open(config: Config) -> Run:
        """Load what the config names, and the state of the newest checkpoint."""
        suite = envs.load(config.env.name, **config.env.options)
        model, tokenizer, renderer = policy.load(config.model)
        run = Run(
            config,
            model,
            tokenizer,
            renderer,
            suite,
            HFEngine(
                model,
                slots=config.engine.slots,
                stop_ids=renderer.stop_ids,
                max_length=config.model.max_length,
                seed=config.seed,
            ),
            writers.load(config.writer, suite, renderer),
            sampling.TaskOrder(suite.tasks(config.env.train_split), config.seed),
            update.Learner.of(config, model, renderer, suite),
        )
        run._resume()
        return run

    def _resume(self) -> None:
        newest = checkpoint.latest(self.config.output_dir)
        if newest and not self.config.resume_from_checkpoint:
            raise UserError(f"output_dir: {self.config.output_dir} holds {newest.name}; resume, or choose another one")
        if newest:
            self.step, extra = checkpoint.load(
                newest,
                model=self.model,
                optimiser=self.learner.optimiser,
                generators={"engine": self.engine.generator},
            )
            self.order.load_state_dict(extra["order"])
        checkpoint.rewind(self.config.output_dir, self.step if newest else -1)

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
            while self.step < config.max_steps:
                found = await self.take_step(logger)
                logger.log(self.step, found)
                if _due(self.step, config.save_steps, config.max_steps):
                    logger.say(f"checkpoint: {self.save()}")

    async def take_step(self, logger: MetricLogger) -> dict[str, float]:
        """Tasks, siblings, reference, credit, update, new weights, reports."""
        config, clock, step = self.config, Clock(), self.step + 1
        with clock("rollout"):
            batch = await self.collect(logger)
        if config.arm != "grpo":
            with clock("reference"):
                await self.writer.write(batch.train)
        found = {**metrics.rollout_metrics(batch.sampled), **batch.metrics()}
        scored: list[list[metrics.Scored]] = []
        if batch.train:
            losses, scored = self.learner.update(batch.train, step, clock)
            found |= losses | self.credit_metrics(batch.train, scored, logger)
        else:
            logger.say(f"step {step}: no group is mixed, nothing to learn from; raise max_resample_times or the tasks")
        self.step = step
        self.engine.load_weights(self.model)
        with clock("report"):
            if config.trace_steps and (step == 1 or _due(step, config.trace_steps, config.max_steps)):
                path = Path(config.output_dir) / "rollouts" / f"step_{step}.jsonl"
                traces.write_step(path, batch.train, scored or None, self.renderer.pieces)
        if _due(step, config.eval_steps, config.max_steps):
            found |= await self.evaluate(logger, clock)
        tokens = sum(len(r.ids) for g in batch.sampled for r in g.rollouts)
        return {**found, **clock.metrics(), "perf/rollout_tokens_per_s": tokens / clock.wall["rollout"]}

    async def collect(self, logger: MetricLogger) -> sampling.Batch:
        """Siblings of the next tasks, until enough groups are mixed."""
        config = self.config
        drawn = Sampling(config.temperature, config.top_p, config.max_completion_length)
        with logger.track("sample siblings", config.groups_per_step) as advance:

            async def sample(task: Task) -> tuple[Group, int]:
                length, n = config.model.max_length, config.num_generations
                result = await run_group(self.engine, self.suite, self.renderer, task, drawn, config.env, length, n)
                advance(1)
                return result

            return await sampling.collect(
                sample,
                self.order,
                groups=config.groups_per_step,
                dynamic=config.dynamic_sample,
                max_resample_times=config.max_resample_times,
            )

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

    def save(self) -> Path:
        """Write the state that the next step starts from."""
        return checkpoint.save(
            self.config.output_dir,
            self.step,
            model=self.model,
            optimiser=self.learner.optimiser,
            generators={"engine": self.engine.generator},
            extra={"order": self.order.state_dict()},
            tokenizer=self.tokenizer,
            save_total_limit=self.config.save_total_limit,
        )


def _due(step: int, every: int, last: int) -> bool:
    """Every so many steps (0: never), and at the end."""
    return step == last or bool(every and step % every == 0)
