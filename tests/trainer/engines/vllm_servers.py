"""vLLM servers that are stubs in processes of their own, for tests of the engine."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from tests.trainer import toy
from tests.trainer.engines import vllm_stub
from trainer.config import Config, EngineConfig, EnvConfig, ModelConfig
from trainer.data import Completion, Sampling
from trainer.engines.vllm import VLLMEngine

FORK = multiprocessing.get_context("fork")  # a process of its own, without minutes of imports on a busy machine
PROMPT = [1, 9, 10, 11, 12]
DRAW = Sampling(max_tokens=6)


class Process:
    """One stub server, on a port that it keeps when it is started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.start()

    def start(self) -> None:
        self.process = FORK.Process(target=vllm_stub.serve, args=(str(self.folder), self.port), daemon=True)
        self.process.start()

    def wait(self) -> None:
        for _ in range(600):
            try:
                if httpx.get(self.url + "/health").is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)
        raise AssertionError("the stub did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def alive(self) -> None:
        if not self.process.is_alive():
            self.start()
        self.wait()
        self.fault("", 0)

    def fault(self, kind: str, times: int = 1_000) -> None:
        httpx.post(self.url + "/fault", json={"kind": kind, "times": times})

    def seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = httpx.get(self.url + "/seen").json()
        return seen


def engine(servers: list[Process], tmp_path: Path, model: Any = None, **options: Any) -> VLLMEngine:
    defaults = {
        "stop_ids": toy.renderer().stop_ids,
        "max_length": 200,
        "timeout": 60.0,
        "pause": 0.01,
        "max_retries": 2,
    }
    urls = [s.url for s in servers]
    return VLLMEngine(model or toy.model(), urls=urls, folder=tmp_path / "weights", **{**defaults, **options})


def draw(eng: VLLMEngine, n: int = 8) -> list[Completion]:
    return asyncio.run(eng.generate(PROMPT, n, DRAW))


def drift(model: Any, completions: list[Completion], prompt: list[int] = PROMPT) -> float:
    """How far the engine's log-probs are from the model's."""
    worst = 0.0
    for c in completions:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + c.ids])).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(c.ids)[:, None])[:, 0]
        worst = max(worst, float((own - torch.tensor(c.logprobs)).abs().max()))
    return worst


def config(folder: Path, out: Path, urls: list[str], **fields: Any) -> Config:
    return Config(
        **{
            "output_dir": out,
            "model": ModelConfig(path=str(folder), max_length=200),
            "env": EnvConfig(name="parity", max_turns=3, timeout=60.0),
            "engine": EngineConfig(name="vllm", urls=urls, timeout=60.0, max_retries=1),
            "arm": "grpo",
            "num_generations": 4,
            "groups_per_step": 2,
            "max_completion_length": 12,
            "max_steps": 2,
            "eval_on_start": False,
            "eval_steps": 2,
            "save_steps": 0,
            "learning_rate": 1e-2,
            **fields,
        }
    )


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Two batches of one draw may differ in their last bits; what was drawn does not.
    kept = ("step", "reward", "completions/", "by_group/", "eval/", "rollout/", "sampling/sampling_logp_difference/max")
    return [{k: round(v, 4) for k, v in line.items() if k.startswith(kept)} for line in lines]
