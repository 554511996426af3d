"""The tiny policy: a Llama of a million parameters, and how it is warm-started."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from scripts.warmstart.demonstrations import Recipe, demonstrations, drills, rote
from scripts.warmstart.vocabulary import tokenizer
from trainer.chat.compact import CompactRenderer
from trainer.learning.sft import sft

Progress = Callable[[str, int, int, float], None]  # phase, step, steps, loss


@dataclass(frozen=True)
class WarmStart:
    """Every number that decides the shipped weights."""

    hidden_size: int = 128
    num_hidden_layers: int = 4
    intermediate_size: int = 448
    seed: int = 0
    drill_steps: int = 100
    drill_batch: int = 128
    rote_steps: int = 100
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 4e-3
    unique_demonstrations: int = 96_000
    recipe: Recipe = field(default_factory=Recipe)

    def key(self) -> str:
        """Hash these numbers, the words and a sample of the demonstrations: what the weights depend on, not how it is
        written."""
        renderer = CompactRenderer(tokenizer())
        shown = [
            *demonstrations(500, renderer, self.recipe, self.seed),
            *drills(100, renderer, self.seed),
            *rote(100, renderer, self.seed),
        ]
        content = [asdict(self), sorted(renderer.vocabulary.items()), [(e.ids, e.loss_mask) for e in shown]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def build(config: WarmStart, vocab_size: int) -> Any:
    """Return the untrained policy; embeddings and head are one matrix, which makes copying easier to learn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=config.hidden_size // 4,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def fingerprint(folder: Path) -> str:
    """Hash the weights of a folder."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def warm_start(config: WarmStart, on_step: Progress) -> tuple[Any, Any]:
    """Train and return (model, tokenizer): copying drills, work by rote, demonstrations."""
    words = tokenizer()
    renderer = CompactRenderer(words)
    model = build(config, len(words))
    work = rote(config.batch_size * config.rote_steps, renderer, config.seed)
    shown = demonstrations(config.unique_demonstrations, renderer, config.recipe, config.seed)
    phases = [
        ("copying drills", drills(config.drill_batch * config.drill_steps, renderer, config.seed), config.drill_batch),
        ("work by rote", work, config.batch_size),
        ("demonstrations", shown + work[: len(shown) // 10], config.batch_size),
    ]
    for (phase, examples, batch_size), steps in zip(phases, (config.drill_steps, config.rote_steps, config.steps)):
        sft(
            model,
            examples,
            steps=steps,
            batch_size=batch_size,
            learning_rate=config.learning_rate,
            pad_id=renderer.pad_id,
            optimiser="muon",
            seed=config.seed,
            on_step=lambda step, loss, phase=phase, steps=steps: on_step(phase, step, steps, loss),  # type: ignore[misc]
        )
    return model, words
