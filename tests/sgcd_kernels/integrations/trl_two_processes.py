"""Under torchrun: GRPOTrainer, SGCDTrainer without credit and with it; rank 0 writes down what came out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from sgcd_kernels.integrations.trl import SGCDConfig, SGCDTrainer, Siblings
from tests.sgcd_kernels.integrations import trl_world as world


def write(group: Siblings) -> str:
    assert len(group.completions) == len(group.rewards) == 4, "half a group"
    return "w20 w21 w22"


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    runs: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "stock": (GRPOTrainer, GRPOConfig, {}),
        "idle": (SGCDTrainer, SGCDConfig, {"gamma": 0.0}),
        "credit": (SGCDTrainer, SGCDConfig, {"d_floor": 1e-3, "reference_func": write}),
    }
    for name, (trainer_class, config, fields) in runs.items():
        trainer = world.built(trainer_class, config, folder, steps_per_generation=4, **fields)
        trainer.train()
        found[name] = (trainer.state.log_history, {k: v.clone() for k, v in trainer.model.state_dict().items()})
    if trainer.accelerator.is_main_process:
        assert trainer.accelerator.num_processes == 2
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()  # left to the interpreter's end, gloo's threads have aborted it once


if __name__ == "__main__":
    main(Path(sys.argv[1]))
