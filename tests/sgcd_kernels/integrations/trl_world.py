"""A tiny but real set-up for TRL's trainers: random weights, a word-level tokenizer, and rewards that differ."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

datasets.disable_progress_bars()

SPECIAL = ("<pad>", "</s>", "<unk>", "<user>", "<system>", "<assistant>")
WORDS = [f"w{i}" for i in range(24)] + ["#", "Reference"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
    made.chat_template = TEMPLATE
    return made


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, which GOLDTrainer asks for: 256 and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*SPECIAL[:3], *alphabet])}
    letters = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
    made.chat_template = TEMPLATE
    return made


def model(config_class: Any = LlamaConfig, vocab_size: int = 32, scale: float = 8.0, **own: Any) -> Any:
    """Random weights, with a head sharp enough that tokens differ in probability."""
    torch.manual_seed(0)
    config = config_class(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }
        | own
    )
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(scale)
    return made


def dataset(made: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list(made)


def rows(count: int = 8, **columns: Any) -> Any:
    """Prompts of text, each with a reference of other words."""
    made = [
        {"prompt": f"w{i} w{i + 1} w{i + 2}", "reference": f"w{i + 9} w{i + 10} w{i + 11} w{i + 12}"} | columns
        for i in range(count)
    ]
    return dataset(made)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Says something of the tokens, so that siblings differ."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def options(folder: Path, **fields: Any) -> dict[str, Any]:
    """The common fields of all configs here."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 5e-2,
        "optim": "sgd",  # Adam would turn rounding of gradients near 0 into steps of the learning rate
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    } | fields


def built(trainer: Any, config: Any, folder: Path, policy: Any = None, data: Any = None, **fields: Any) -> Any:
    """A trainer of that class; what is no field of its config goes to the trainer."""
    others = {name: fields.pop(name) for name in ("peft_config", "reference_func", "rollout_func") if name in fields}
    return trainer(
        model() if policy is None else policy,
        reward,
        config(**options(folder, **fields)),
        rows() if data is None else data,
        processing_class=tokenizer(),
        **others,
    )


def two_turns(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """A rollout function: four tokens of the policy, three of a tool, four of the policy, masked accordingly."""
    texts = trainer._tokenize_prompts(prompts)[0]
    ids: list[list[int]] = [[] for _ in prompts]
    generator = torch.Generator().manual_seed(trainer._step)
    for wanted in (4, 3, 4):
        for i, prompt in enumerate(texts):
            if wanted == 3:
                ids[i] += [6, 7, 8]
                continue
            for _ in range(wanted):
                with torch.no_grad():
                    logits = trainer.model(input_ids=torch.tensor([prompt + ids[i]])).logits[0, -1]
                probabilities = torch.softmax(logits / trainer.temperature, -1)
                ids[i].append(int(torch.multinomial(probabilities, 1, generator=generator)))
    mask = [1] * 4 + [0] * 3 + [1] * 4
    return {
        "prompt_ids": texts,
        "completion_ids": ids,
        "logprobs": [[0.0] * len(x) for x in ids],
        "env_mask": [mask for _ in ids],
    }


@pytest.fixture(autouse=True, scope="module")
def quick_collection() -> Iterator[None]:
    """`train` ends in a full garbage collection, slower than its three steps: exclude what is loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
