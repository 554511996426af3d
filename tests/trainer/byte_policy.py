"""A policy with one token per byte, and an engine that samples given messages: for tests of environments and SFT."""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from trainer.chat.chatml import ChatMLRenderer
from trainer.data import Completion, Message, Sampling


def tokenizer() -> Any:
    """One token a byte, and the ChatML markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(marks)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


class ScriptedEngine:
    """Says given messages, one a turn: gold for the first siblings, nothing of use for the others."""

    def __init__(self, renderer: ChatMLRenderer, scripts: list[list[Message]]) -> None:
        self.renderer = renderer
        self.scripts = [list(script) for script in scripts]
        self.playing: dict[int, list[Message]] = {}

    async def generate(self, prompt_ids: Any, n: int, sampling: Sampling) -> list[Completion]:
        episode = asyncio.current_task()
        script = self.playing.get(id(episode)) or self.scripts.pop(0)
        ids = self.renderer.turn(script[0])
        self.playing[id(episode)] = script[1:]
        return [Completion(ids, [-1.0] * len(ids), "stop")]
