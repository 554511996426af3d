"""Peak memory of one loss and its gradient in TRL's trainers, with our heads and with their own; as a table.

python -m tests.sgcd_kernels.integrations.trl_memory

Each row is a process of its own; how a peak is taken is in bench/memory.py. The model is two layers of width 64 under
a tied head of 49,152 words (SmolLM2's vocabulary): what is measured is the head.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

VOCABULARY, ROWS, TOKENS = 49_152, 8, 128
FAMILIES = ("SGCD", "GKD", "GOLD", "SDPO", "SDFT", "Distillation")


def prepared(family: str, folder: Path, tokens: int) -> tuple[Any, Any]:
    """A trainer and a micro-batch of it."""
    from sgcd_kernels.integrations.trl import SGCDConfig, SGCDTrainer
    from tests.sgcd_kernels.integrations import test_trl_distillation as distillation
    from tests.sgcd_kernels.integrations import trl_world as world

    long = {"max_new_tokens" if family == "GKD" else "max_completion_length": tokens}
    sizes = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1} | long
    own = {"hidden_size": 64, "tie_word_embeddings": True, "vocab_size": VOCABULARY, "eos_token_id": VOCABULARY - 1}
    if family == "SGCD":
        trainer = world.built(SGCDTrainer, SGCDConfig, folder, policy=world.model(**own, scale=1.0), **sizes)
    else:
        trainer_class, config, _, options = distillation.FAMILIES[family]
        words = " ".join(f"w{i % 9}" for i in range(tokens if family == "GKD" else tokens // 3))
        if family in ("GKD", "GOLD"):
            user, told = {"role": "user", "content": "w1"}, {"role": "assistant", "content": words}
            rows = [{"messages": [user, told]}] * ROWS
            distillation.FAMILIES[family] = (trainer_class, config, rows, options)
        trainer = distillation.built(family, folder, vocab_size=VOCABULARY, **sizes)
    trainer.model.config.eos_token_id = trainer.model.generation_config.eos_token_id = None
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def measure(family: str, ours: bool) -> tuple[int, int]:
    """(bytes beyond model and batch, loss tokens)"""
    from trl import GRPOTrainer

    from bench.memory import give_blocks_back, peak_of
    from sgcd_kernels.integrations.trl import linear_distillation

    libc = give_blocks_back()
    with tempfile.TemporaryDirectory() as folder:

        def once(trainer: Any, inputs: Any) -> None:
            trainer.model.zero_grad(set_to_none=True)
            if family == "SGCD" and not ours:  # TRL's own head and loss, on the same model and batch
                GRPOTrainer._compute_loss(trainer, trainer.model, inputs).backward()
            else:
                trainer.compute_loss(trainer.model, inputs).backward()

        def head(trainer: Any) -> Any:
            if family == "SGCD" and not ours:
                trainer._head.temperature = None
            return linear_distillation(trainer) if ours and family != "SGCD" else contextlib.nullcontext()

        small, batch = prepared(family, Path(folder), 8)
        with head(small):
            once(small, batch)
        del small, batch
        trainer, batch = prepared(family, Path(folder), TOKENS)
        with head(trainer):
            peak = peak_of(lambda: once(trainer, batch), libc)
    mask = batch["completion_mask"] if "completion_mask" in batch else batch["labels"][:, 1:] != -100
    assert peak is not None, "this system does not tell its peak memory"
    return peak, int(mask.sum())


def measured(family: str, ours: bool) -> tuple[int, int]:
    """As `measure`, in a process of its own."""
    command = [sys.executable, "-m", "tests.sgcd_kernels.integrations.trl_memory", family, "ours" if ours else "own"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, tokens = done.stdout.split()[-2:]
    return int(peak), int(tokens)


def main(arguments: list[str]) -> None:
    warnings.filterwarnings("ignore")
    if arguments:
        with contextlib.redirect_stdout(open(os.devnull, "w")):  # noqa: PTH123
            found = measure(arguments[0], arguments[1] == "ours")
        print(*found)
        return
    print("| trainer | loss tokens | its own path, MB | from hidden states, MB |\n|---|---|---|---|")
    for family in FAMILIES:
        (own, tokens), (ours, _) = measured(family, False), measured(family, True)
        name = "GRPO / SGCD" if family == "SGCD" else family
        print(f"| {name} | {tokens:,} | {own / 1e6:,.0f} | {ours / 1e6:,.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
