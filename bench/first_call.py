"""A task that every trainer can play: an office errand of which only the first tool call counts; and TRL playing it.

Multi-turn rollouts with tools are driven differently by every trainer; one assistant turn is the same thing to all. The
reward is 1 if the turn's first call has the name of the gold plan's first call. TRL gets the same model, prompts, group
size, token limit, loss and optimiser as our trainer; it samples with `generate` of transformers, its default.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import envs
from trainer.config import Config
from trainer.data import Message, Outcome, Task, Tool
from trainer.envs.workday.gold import solve
from trainer.learning import model as policy
from trainer.protocols import Renderer


def gold_name(task: Task) -> str:
    """The tool that the gold plan calls first; "" if it just answers."""
    steps = solve(task.data).steps
    return steps[0].call.name if steps else ""


def reward(message: Message, wanted: str) -> float:
    calls = message.get("tool_calls") or []
    return float((calls[0]["function"]["name"] if calls else "") == wanted)


class FirstCall:
    """One turn of a workday episode."""

    def __init__(self) -> None:
        self.inner = envs.load("workday").make()
        self.score = 0.0

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        self.wanted = gold_name(task)
        return await self.inner.reset(task)

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        self.score = reward(message, self.wanted)
        return [], True

    async def outcome(self) -> Outcome:
        return Outcome(self.score)

    async def close(self) -> None:
        await self.inner.close()


class FirstCallSuite:
    """Workday's tasks, ended after the first turn."""

    name = "first_call"

    def __init__(self) -> None:
        self.inner = envs.load("workday")
        self.splits: Mapping[str, int] = self.inner.splits

    def tasks(self, split: str) -> list[Task]:
        return self.inner.tasks(split)

    def make(self) -> FirstCall:
        return FirstCall()

    def answer_literals(self, task: Task) -> list[str]:
        return self.inner.answer_literals(task)

    def refusal(self) -> Message:
        return self.inner.refusal()


async def prompt_text(suite: FirstCallSuite, renderer: Renderer, task: Task) -> str:
    """The prompt of our trainer as text, which the tokenizer turns into the same tokens."""
    environment = suite.make()
    messages, tools = await environment.reset(task)
    await environment.close()
    return renderer.decode(renderer.prompt(messages, tools))


class Clock:
    """Seconds of each step, and of the generation in it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.rollouts: list[float] = []
        self.tokens: list[int] = []
        self._start = 0.0

    def begin(self) -> None:
        self._start = time.perf_counter()

    def end(self) -> None:
        self.steps.append(time.perf_counter() - self._start)

    def around(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            found = generate(*arguments, **options)
            self.rollouts.append(time.perf_counter() - start)
            self.tokens.append(sum(len(ids) for ids in found[0]))
            return found

        return timed


def train_with_trl(config: Config, steps: int, folder: Path) -> Clock:
    """Train for `steps` steps; the clock of all of them."""
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    datasets.disable_progress_bars()
    model, tokenizer, renderer = policy.load(config.model)
    suite = FirstCallSuite()
    tasks = suite.tasks(config.env.train_split)
    rows = [{"prompt": asyncio.run(prompt_text(suite, renderer, t)), "wanted": gold_name(t)} for t in tasks]
    for row, task in zip(rows[:3], tasks):
        sent = tokenizer(row["prompt"])["input_ids"]
        assert renderer.decode(sent) == row["prompt"], task.id

    def judge(completion_ids: Sequence[Sequence[int]], wanted: Sequence[str], **_: Any) -> list[float]:
        return [reward(renderer.parse(list(ids))[0], w) for ids, w in zip(completion_ids, wanted)]

    clock = Clock()

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    arguments = GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.groups_per_step * config.num_generations,
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        loss_type=config.loss_type,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        beta=0.0,
        temperature=config.temperature,
        use_cpu=next(model.parameters()).device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=config.seed,
    )
    trainer = GRPOTrainer(
        model, judge, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.add_callback(Watch())
    trainer._generate_single_turn = clock.around(trainer._generate_single_turn)
    trainer.train()
    return clock
