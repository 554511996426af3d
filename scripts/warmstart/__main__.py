"""`python -m scripts.warmstart`: regenerate the tiny policy's weights and print the gate they must pass.

Weights are kept under a hash of everything they depend on: when nothing changed, only the gate is measured again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from scripts.warmstart.gate import Gate, measure
from scripts.warmstart.policy import WarmStart, fingerprint, warm_start
from trainer.chat.compact import CompactRenderer

FOLDER = Path("trainer/assets/workday-tiny")


def train(config: WarmStart, folder: Path) -> None:
    """Warm-start and save."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bars: dict[str, Any] = {}

        def on_step(phase: str, step: int, steps: int, loss: float) -> None:
            if phase not in bars:
                bars[phase] = progress.add_task(phase, total=steps)
            progress.update(bars[phase], completed=step + 1, description=f"{phase}, loss {loss:.3f}")

        model, tokenizer = warm_start(config, on_step)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def report(gate: Gate, console: Console) -> None:
    table = Table("prompt", "success", title=f"the gate: {gate.tasks} dev tasks with a reference")
    for name in ("student", "true_reference", "wrong_task", "empty_shell"):
        table.add_row(name.replace("_", " "), f"{getattr(gate, name):.3f}")
    table.add_section()
    table.add_row("student, whole dev split", f"{gate.dev:.3f}")
    table.add_row("dev groups that are mixed", f"{gate.dev_mixed:.3f}")
    table.add_row("argument accuracy", f"{gate.argument_accuracy:.3f}")
    console.print(table)
    console.print("failures on dev: " + ", ".join(f"{kind} {count}" for kind, count in gate.failures.items()))
    for what, holds in gate.verdicts().items():
        console.print(f"{'ok  ' if holds else 'MISS'} {what}", highlight=False)


def main() -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="train even if the weights are up to date")
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"where the weights go (default {FOLDER})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small lose more to the hand-over between threads than they gain
    config, console = WarmStart(), Console()
    record = arguments.output / "warmstart.json"
    kept = json.loads(record.read_text())["key"] if record.is_file() else ""
    if arguments.force or kept != config.key():
        train(config, arguments.output)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.output, local_files_only=True, trust_remote_code=False
    ).eval()
    renderer = CompactRenderer(
        AutoTokenizer.from_pretrained(arguments.output, local_files_only=True, trust_remote_code=False)
    )
    gate = measure(model, renderer)
    made = {"key": config.key(), "weights": fingerprint(arguments.output)}
    record.write_text(json.dumps({**made, "config": asdict(config), "gate": asdict(gate)}, indent=1) + "\n")
    report(gate, console)
    return 0 if all(gate.verdicts().values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
