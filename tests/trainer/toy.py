"""A real, tiny world for the trainer's tests: a model of random weights, the compact language, and an environment.

The *parity* task: call `peek` as often as you like, then say an even number of words. A policy of random weights
succeeds at about half of it, so its groups are mixed.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3_5TextConfig, Qwen3Config

from trainer.chat.compact import SPECIAL, CompactRenderer
from trainer.data import Message, Outcome, Task, Tool
from trainer.errors import EnvironmentBroken

WORDS = ["peek", "poke", "at", "error", "seen", "odd", "even", "say", *(f"w{i}" for i in range(8))]
TOOLS: list[Tool] = [{"type": "function", "function": {"name": "peek", "description": "", "parameters": {}}}]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


def renderer() -> CompactRenderer:
    return CompactRenderer(tokenizer())


_KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {}),
    "sliding": (Qwen3Config, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3_5": (
        Qwen3_5TextConfig,
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
}


def model(kind: str = "llama", seed: int = 0, vocab_size: int = 24, scale: float = 8.0) -> Any:
    """Random weights, with a head sharp enough that tokens differ in probability.

    "qwen3_5" has a gated-delta layer below one of full attention; "sliding" is a Qwen3 with a window of 16.
    """
    config_class, own = _KINDS[kind]
    config = config_class(
        **own,
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=None,  # Llama's default is 2, here <user>
    )
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(scale)
    return made


class ParityEnvironment:
    """`fault` says which method fails, and how: ("step", RuntimeError("boom")); a float sleeps that long."""

    def __init__(self, log: list[str], faults: list[tuple[str, Any]]) -> None:
        self.log, self.faults = log, faults
        self.words: int | None = None

    async def _maybe_fail(self, method: str) -> None:
        self.log.append(method)
        if self.faults and self.faults[0][0] == method:
            _, fault = self.faults.pop(0)
            if isinstance(fault, BaseException):
                raise fault
            import asyncio

            await asyncio.sleep(fault)

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        await self._maybe_fail("reset")
        return [{"role": "user", "content": task.instruction}], TOOLS

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        await self._maybe_fail("step")
        self.log.append(json.dumps(message))
        calls = message.get("tool_calls") or []
        if not calls:
            self.words = len((message.get("content") or "").split())
            return [], True
        return [{"role": "tool", "tool_call_id": c["id"], "content": "seen w1 w2 w3"} for c in calls], False

    async def outcome(self) -> Outcome:
        await self._maybe_fail("outcome")
        return Outcome(float(self.words is not None and self.words % 2 == 0), {"words": self.words})

    async def close(self) -> None:
        await self._maybe_fail("close")


class ParitySuite:
    name = "parity"

    def __init__(self, tasks: int = 6, faults: list[tuple[str, Any]] | None = None) -> None:
        self.splits = {"train": tasks, "dev": 3}
        self.faults = faults or []
        self.log: list[str] = []

    def tasks(self, split: str) -> list[Task]:
        return [
            Task(f"{split}-{i}", self.name, split, f"{split}-{i // 3}", "information", f"say w{i % 8} even")
            for i in range(self.splits[split])
        ]

    def make(self) -> ParityEnvironment:
        return ParityEnvironment(self.log, self.faults)

    def answer_literals(self, task: Task) -> list[str]:
        return ["w7"]

    def refusal(self) -> Message:
        return {"role": "assistant", "content": "odd"}


def suite(**options: Any) -> ParitySuite:
    return ParitySuite(**options)


BROKEN = EnvironmentBroken("the world ended")
