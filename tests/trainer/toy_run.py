"""Runs of the toy environment: a config, and what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sgcd_kernels import CreditConfig
from trainer import loop
from trainer.config import Config, EngineConfig, EnvConfig, ModelConfig
from trainer.records import checkpoint


def config(folder: Path, output_dir: Path, **fields: Any) -> Config:
    return Config(
        **{
            "output_dir": output_dir,
            "model": ModelConfig(path=str(folder), max_length=200),
            "env": EnvConfig(name="parity", max_turns=3, timeout=10.0),
            "engine": EngineConfig(slots=16),
            "credit": CreditConfig(d_floor=1e-3),
            "num_generations": 4,
            "groups_per_step": 3,
            "max_completion_length": 12,
            "max_steps": 3,
            "eval_steps": 2,
            "save_steps": 1,
            "trace_steps": 2,
            "learning_rate": 1e-3,
            **fields,
        }
    )


CLOCKS = ("time/", "perf/", "reference/seconds")


def records(run: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock said."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run)
    assert newest is not None
    return load_file(newest / "model.safetensors")


def identical(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def kill_at_step_3(patch: pytest.MonkeyPatch, where: str) -> None:
    """Stop after the optimiser has moved, before the checkpoint, or after it and before the metrics are written."""
    if where != "update":
        method = getattr(loop.Run, where)

        def fail(run: loop.Run, *arguments: Any) -> Any:
            if run.step == 3:
                raise KeyboardInterrupt
            return method(run, *arguments)

        patch.setattr(loop.Run, where, fail)
        return
    learn = loop.Learner.update

    def half(self: Any, groups: Any, step: int, clock: Any) -> Any:
        found = learn(self, groups, step, clock)
        if step == 3:
            raise KeyboardInterrupt
        return found

    patch.setattr(loop.Learner, "update", half)
