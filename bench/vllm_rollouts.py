"""How fast one step's rollouts are through `hf` and through vLLM, interleaved, with the same model.

    python -m bench.vllm_rollouts MODEL [--rounds 3] [--tokens 32] [--dtype bfloat16] [--eager]
                                             [--vllm colocate|PYTHON|none] [--hf off bfloat16]

Sixteen rollouts of three turns. vLLM is colocated (Python is then vLLM's own), or served by PYTHON; `hf` runs in fp32
and under bf16 autocast. New weights are given before each round and timed apart. Needs a machine without other work:
the load is said at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tests.trainer.engines.vllm_world import config, play, prepare
from trainer import engines
from trainer.config import Config
from trainer.data import Sampling
from trainer.learning import model as policy
from trainer.protocols import Engine

ROLLOUTS = 16


def players(given: argparse.Namespace, out: Path) -> dict[str, tuple[Engine, Any, Any, Config]]:
    """name -> (engine, its model, renderer, config)"""
    made: dict[str, tuple[Engine, Any, Any, Config]] = {}
    for autocast in given.hf:
        plain = config(given.model, out / "hf")
        plain = plain.model_copy(update={"model": plain.model.model_copy(update={"autocast": autocast})})
        model, _, renderer = policy.load(plain.model)
        made[f"hf, autocast {autocast}"] = (engines.make(plain, model, renderer), model, renderer, plain)
    if given.vllm == "none":
        return made
    args = ["--dtype", given.dtype, *(["--enforce-eager"] if given.eager else [])]
    place = {"vllm_mode": "colocate"} if given.vllm == "colocate" else {"python": given.vllm}
    served = config(given.model, out / "vllm", name="vllm", server_args=args, **place)
    model, _, renderer = policy.load(served.model)
    begun = time.monotonic()
    where = "colocated" if given.vllm == "colocate" else "server"
    name = f"vllm {where}, {given.dtype}, {'eager' if given.eager else 'compiled'}"
    made[name] = (engines.make(served, model, renderer), model, renderer, served)
    print(f"{name}: started in {time.monotonic() - begun:.1f} s", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--vllm", default="colocate")
    parser.add_argument("--hf", nargs="*", default=["off", "bfloat16"])
    given = parser.parse_args()
    prepare(given.model)
    rates, updates = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    with TemporaryDirectory() as folder:
        made = players(given, Path(folder))
        for turn in range(given.rounds + 1):  # the first warms up
            for name, (engine, model, renderer, each) in made.items():
                tokens, rate, update = measure(engine, model, renderer, each, given.tokens if turn else 4)
                if turn:
                    rates[name].append(rate)
                    updates[name].append(update)
                    print(f"{name}: {tokens} tokens, {rate:.1f} tokens/s, update {update:.2f} s", flush=True)
    last = list(made)[-1]
    print(f"load {os.getloadavg()[0]:.1f}; medians of {given.rounds}, at most {given.tokens} tokens a turn:")
    for name in made:
        more = "" if name == last else f"; {last} is {median(rates[last]) / median(rates[name]):.2f} x as fast"
        print(f"  {name}: {median(rates[name]):.1f} tokens/s, update {median(updates[name]):.2f} s{more}")


def measure(engine: Engine, model: Any, renderer: Any, made: Config, tokens: int) -> tuple[int, float, float]:
    """Tokens sampled, tokens a second, and the seconds that new weights take."""
    made = made.model_copy(update={"max_completion_length": tokens})
    engine.load_weights(model)
    begun = time.monotonic()
    asyncio.run(engine.generate([1, 2, 3], 1, Sampling(max_tokens=1)))
    update = time.monotonic() - begun
    recorded, _, seconds = asyncio.run(play(engine, renderer, made, ROLLOUTS))
    return recorded.tokens, recorded.tokens / seconds, update


if __name__ == "__main__":
    main()
