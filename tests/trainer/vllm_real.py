"""`make test-vllm`: the trainer against a true vLLM server, and what it gains.

    python -m tests.trainer.vllm_real PYTHON MODEL

PYTHON has vllm; MODEL is a SmolLM2 folder. Two SGCD steps are trained through a server; then the log-probs that the
server gives must have moved as the trainer's own model says. The same 16 rollouts are timed through both engines, and
one environment is made slow, to see that the server goes on.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from trainer import checkpoint, envs, loop, real
from trainer import model as policy
from trainer.config import Config
from trainer.engines import vllm_launch
from trainer.rollout import run_episode, together
from trainer.types import Completion, Engine, Message, Outcome, Sampling, Task, Tool

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
    splits = {"train": 8, "dev": 2}

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


def config(model: str, out: Path, **engine: Any) -> Config:
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
    """`n` episodes at once; the first `slow` environments think for long. Gives the seconds it took."""
    recorded, world = Recorded(engine), Suite()
    world.slow_ones = slow
    task, draw = world.tasks("train")[0], Sampling(max_tokens=made.max_completion_length)
    start = time.monotonic()
    episodes = (run_episode(recorded, world, renderer, task, draw, made.env, 768) for _ in range(n))
    done = await together(episodes)
    assert all(r is not None for r in done)
    return recorded, world, time.monotonic() - start


def idle(busy: list[tuple[float, float]], start: float, end: float) -> float:
    """Seconds of [start, end] in which no request was with the engine."""
    free, reached = 0.0, start
    for a, b in sorted((max(a, start), min(b, end)) for a, b in busy if b > start and a < end):
        free += max(0.0, a - reached)
        reached = max(reached, b)
    return free + max(0.0, end - reached)


def score(url: str, prompt: list[int], text: list[int]) -> torch.Tensor:
    """The server's own log-probs of a fixed text."""
    import httpx

    params = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0, "detokenize": False}
    body = {"token_ids": prompt + text, "sampling_params": params}
    answer = httpx.post(f"{url}/inference/v1/generate", json=body, timeout=120, trust_env=False).raise_for_status()
    rows = answer.json()["prompt_logprobs"][len(prompt) :]
    return torch.tensor([row[str(token)]["logprob"] for row, token in zip(rows, text)])


def own_score(model: Any, prompt: list[int], text: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    scores: torch.Tensor = logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None])[:, 0]
    return scores


def print_trace(recorded: Recorded, world: Suite) -> None:
    """When requests were with the engine while one environment thought."""
    ((start, end),) = world.log
    meanwhile = [b for a, b in recorded.spans if a < end and b > start]
    last = min(end, max(meanwhile, default=start))
    free = idle(recorded.spans, start, last)
    print(f"one environment thought for {end - start:.1f} s; in it the engine had {len(meanwhile)} requests,")
    print(f"had done them after {last - start:.1f} s, and was idle for {free:.3f} s before that")
    origin = min(a for a, _ in recorded.spans)
    for a, b in sorted(recorded.spans)[::4]:
        print(f"  request      {a - origin:6.2f} - {b - origin:6.2f} s")
    print(f"  environment  {start - origin:6.2f} - {end - origin:6.2f} s")


def main(python: str, path: str) -> None:
    envs.SUITES["short"] = __name__
    base, gguf = Path(path), real.gguf_file()
    real.cached(base, {"gguf": real.digest(gguf), "format": 1}, lambda fresh: real.extract(gguf, fresh))
    with TemporaryDirectory() as folder:
        out = Path(folder)
        args = ["--dtype", "float32", "--enforce-eager"]
        launch = config(path, out / "server", name="vllm", python=python, server_args=args)
        model, tokenizer, renderer = policy.load(launch.model)
        begun = time.monotonic()
        url = vllm_launch.start(launch, model, out / "server" / "engine_weights")
        print(f"server: {url}, started in {time.monotonic() - begun:.0f} s", flush=True)
        made = config(path, out / "run", name="vllm", urls=[url])

        prompt = renderer.prompt([{"role": "user", "content": "In one short sentence, greet me."}], TOOLS)
        text = tokenizer.encode("Good morning to you, and welcome to the house of words.")
        before, own_before = score(url, prompt, text), own_score(model, prompt, text)
        assert float((before - own_before).abs().max()) < 1e-3, "the server does not serve the model it was given"
        loop.train(made)
        lines = [json.loads(line) for line in (made.output_dir / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            gap = line["sampling/sampling_logp_difference/max"]
            print(
                f"step {line['step']:.0f}: {line['by_group/trained']:.0f} mixed groups, gap at most {gap:.1e}",
                flush=True,
            )
            assert gap < 1e-2
        newest = checkpoint.latest(made.output_dir)
        assert newest is not None and newest.name == "step_2"
        checkpoint.load(newest, model=model)
        engine = policy.engine(made, model, renderer)
        asyncio.run(engine.generate(prompt, 1, Sampling(max_tokens=1)))  # which gives the server the weights of step 2
        moved, own_moved = score(url, prompt, text) - before, own_score(model, prompt, text) - own_before
        server, trainer = float(moved.abs().mean()), float(own_moved.abs().mean())
        apart = float((moved - own_moved).abs().max())
        print(f"log-probs of a fixed text moved by {server:.4f} (server), {trainer:.4f} (trainer), {apart:.1e} apart")
        assert server > 1e-3, "the served weights did not change"
        assert apart < 2e-3, "the served weights are not the trainer's"

        local = policy.engine(config(path, out / "hf"), model, renderer)
        rates = {}
        for _ in range(2):  # interleaved; the first warms up
            for name, each in (("vllm", engine), ("hf", local)):
                each.load_weights(model)
                recorded, _, seconds = asyncio.run(play(each, renderer, made, 16))
                rates[name] = recorded.tokens / seconds
                print(f"16 rollouts through {name}: {recorded.tokens} tokens in {seconds:.1f} s", flush=True)
        print(f"vllm generates {rates['vllm'] / rates['hf']:.2f} x as fast as hf")

        recorded, world, _ = asyncio.run(play(engine, renderer, made, 16, slow=1))
        print_trace(recorded, world)


if __name__ == "__main__":
    main(*sys.argv[1:])
