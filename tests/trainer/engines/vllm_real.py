"""`make test-vllm`: two SGCD steps of SmolLM2-135M through vLLM itself.

    python -m tests.trainer.engines.vllm_real MODEL PYTHON      through a server that PYTHON, which has vllm, runs
    python -m tests.trainer.engines.vllm_real MODEL colocate    in this process, if this Python has vllm

MODEL is where the SmolLM2 folder is or goes. The log-probs that vLLM gives to a fixed text must move with training as
the trainer's own model says. The server is killed (SIGKILL) in the second step; one environment is made slow, to see
that vLLM goes on.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch

from tests.trainer.engines.vllm_world import TOOLS, Recorded, Suite, config, idle, play, prepare
from trainer import engines, envs, loop
from trainer.config import Config
from trainer.data import Sampling
from trainer.engines.vllm import VLLMEngine
from trainer.learning import model as policy
from trainer.protocols import Engine
from trainer.records import checkpoint

SAYS = "Good morning to you, and welcome to the house of words."
EXACT = ["--dtype", "float32", "--enforce-eager"]


def score(engine: Engine, prompt: list[int], text: list[int]) -> torch.Tensor:
    """vLLM's own log-probs of a fixed text, from the weights that `engine` has."""
    asyncio.run(engine.generate(prompt, 1, Sampling(max_tokens=1)))
    if isinstance(engine, VLLMEngine):
        params: dict[str, Any] = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0, "detokenize": False}
        body = {"token_ids": prompt + text, "sampling_params": params}
        url = engine.servers[0].url + "/inference/v1/generate"
        answer = httpx.post(url, json=body, timeout=120, trust_env=False).raise_for_status()
        rows = answer.json()["prompt_logprobs"][len(prompt) :]
        return torch.tensor([row[str(token)]["logprob"] for row, token in zip(rows, text)])
    from vllm import SamplingParams

    vllm: Any = engine._vllm  # type: ignore[attr-defined]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    vllm.add_request("score", {"prompt_token_ids": prompt + text}, params)
    done: list[Any] = []
    while not done:
        done = [output for output in vllm.step() if output.finished]
    rows = done[0].prompt_logprobs[len(prompt) :]
    return torch.tensor([row[token].logprob for row, token in zip(rows, text)])


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
    print(f"  environment  {start - origin:6.2f} - {end - origin:6.2f} s", flush=True)
    assert meanwhile and free < 0.1


def kill_server_in_step(step: int, saves: int) -> None:
    """Have the run's server killed when the sixth request of `step` is made; `saves` weights were given before it."""
    generate, count = VLLMEngine.generate, 0

    async def doomed(self: VLLMEngine, *args: Any) -> Any:
        nonlocal count
        count += self._saves == saves + step  # the weights of a step are one save
        if count == 6 and (process := self.servers[0].process):
            count += 1
            pid = process._process.pid  # type: ignore[attr-defined]
            server = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
            os.kill(server, signal.SIGKILL)
            print(f"kill -9 {server}: the server, in step {step}", flush=True)
        return await generate(self, *args)

    VLLMEngine.generate = doomed  # type: ignore[method-assign]


def check_steps(made: Config) -> None:
    """Both steps were taken, vLLM and trainer agree, and no rollout was lost."""
    lines = [json.loads(line) for line in (made.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        gap = line["sampling/sampling_logp_difference/max"]
        print(
            f"step {line['step']:.0f}: {line['by_group/trained']:.0f} mixed groups, gap at most {gap:.1e}", flush=True
        )
        assert gap < 1e-2 and line["rollout/errored"] == 0


def check_moved(made: Config, engine: Engine, model: Any, before: torch.Tensor, own: torch.Tensor, asks: Any) -> None:
    """From the weights of the start to those of step 2, vLLM's log-probs moved as the trainer's."""
    newest = checkpoint.latest(made.output_dir)
    assert newest is not None and newest.name == "step_2"
    checkpoint.load(newest, model=model)
    engine.load_weights(model)
    moved, own_moved = score(engine, *asks) - before, own_score(model, *asks) - own
    served, trainer = float(moved.abs().mean()), float(own_moved.abs().mean())
    apart = float((moved - own_moved).abs().max())
    print(f"log-probs of a fixed text moved by {served:.4f} (vLLM), {trainer:.4f} (trainer), {apart:.1e} apart")
    assert served > 1e-3, "vLLM's weights did not change"
    assert apart < 2e-3, "vLLM's weights are not the trainer's"


def main(path: str, where: str) -> None:
    envs.SUITES["short"] = "tests.trainer.engines.vllm_world"
    prepare(path)
    place: dict[str, Any] = {"vllm_mode": "colocate"} if where == "colocate" else {"python": where}
    with TemporaryDirectory() as folder:
        made = config(path, Path(folder) / "run", name="vllm", server_args=EXACT, **place)
        model, tokenizer, renderer = policy.load(made.model)
        prompt = renderer.prompt([{"role": "user", "content": "In one short sentence, greet me."}], TOOLS)
        asks = (prompt, tokenizer.encode(SAYS))
        begun = time.monotonic()
        engine = engines.make(made, model, renderer)
        print(f"vLLM ({where}) started in {time.monotonic() - begun:.0f} s", flush=True)
        before, own = score(engine, *asks), own_score(model, *asks)
        assert float((before - own).abs().max()) < 1e-3, "vLLM does not have the weights that it was given"
        train(made, engine)
        check_steps(made)
        check_moved(made, engine, model, before, own, asks)
        recorded, world, _ = asyncio.run(play(engine, renderer, made, 16, slow=1))
        print_trace(recorded, world)


def train(made: Config, engine: Engine) -> None:
    """The run, with the engine that is there already: a process has room for one vLLM, and so has this machine."""
    if isinstance(engine, VLLMEngine):
        kill_server_in_step(2, engine._saves)
    engines.make = lambda config, model, renderer: engine
    run = loop.Run.open(made)
    engine.load_weights(run.model)
    asyncio.run(run.train())


if __name__ == "__main__":
    main(*sys.argv[1:])
