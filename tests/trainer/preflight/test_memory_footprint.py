"""The memory that `check` predicts, against models that are really there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3_5Config, Qwen3_5TextConfig

from tests.trainer import toy
from trainer.config import Config
from trainer.errors import UserError
from trainer.learning.model import compute_in_bf16
from trainer.preflight import memory_footprint

QWEN35_4B = {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True}  # the rest are the defaults
LAYERS = {  # by hand: H 2560, 16 query and 4 key heads of 256, 16 and 32 linear heads of 128
    "linear": 2560 * (2 * 2048 + 4096) + 2560 * 4096 + 2 * 2560 * 32 + 8192 * 4 + 2 * 32 + 128 + 4096 * 2560,
    "full": 2560 * (2 * 16 * 256) + 2 * 2560 * (4 * 256) + 2 * 256 + 16 * 256 * 2560,
    "each": 3 * 2560 * 9216 + 2 * 2560,
}


def config(folder: Path, **fields: Any) -> Config:
    model = {"path": str(folder), "max_length": 200, **fields.pop("model", {})}
    return Config.model_validate({"model": model, "max_completion_length": 16, "tokens_per_microbatch": 800, **fields})


def released(folder: Path) -> Path:
    """config.json as the released folder has it, a vision tower beside the text; no weights."""
    Qwen3_5Config(text_config=QWEN35_4B, tie_word_embeddings=True).save_pretrained(folder)
    return folder


def test_qwen35_4b_is_counted_to_the_parameter(tmp_path: Path) -> None:
    made = config(released(tmp_path), model={"max_length": 32_768, "autocast": "bfloat16"}, tokens_per_microbatch=1)
    facts = memory_footprint.facts(made)
    by_hand = 248_320 * 2560 + 24 * LAYERS["linear"] + 8 * LAYERS["full"] + 32 * LAYERS["each"] + 2560
    assert facts.parameters == facts.trained == by_hand == 4_205_751_296
    assert (facts.head, facts.tied, facts.hidden) == (248_320 * 2560, True, 2560)
    assert facts.layers == {"linear_attention": 24, "full_attention": 8}
    assert facts.cache == 8 * 2 * 4 * 256
    matrices = by_hand - 248_320 * 2560 - 2560 - 32 * 2 * 2560 - 24 * (2 * 32 + 128) - 8 * 2 * 256
    copies = sum(facts.kept[kind].fixed * n for kind, n in facts.layers.items())
    assert copies == pytest.approx(2 * matrices, rel=0.01)  # and a chunk's state, more or less
    assert memory_footprint.memory(made, facts).total > 4 * 4 * by_hand


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_5"])
@pytest.mark.parametrize("autocast", ["off", "bfloat16"])
def test_what_is_predicted_is_what_a_model_holds(kind: str, autocast: str, tmp_path: Path) -> None:
    """Parameters, gradients, moments, and what autograd keeps of a row three times as long as those that were run."""
    model = toy.model(kind)
    model.save_pretrained(tmp_path)
    facts = memory_footprint.facts(config(tmp_path, model={"autocast": autocast}))
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    kinds = memory_footprint.layer_kinds(model.config)
    tokens = 3 * max(memory_footprint.LENGTHS)
    if autocast == "bfloat16":
        compute_in_bf16(model.get_decoder())  # as the trainer does it
    outside, each = memory_footprint.kept_by(model, torch.zeros((1, tokens), dtype=torch.long))
    predicted = [facts.kept[part].fixed + facts.kept[part].row(tokens) for part in ("outside", *kinds)]
    assert sum(predicted) == pytest.approx(outside + sum(each), rel=1e-6)
    optimiser = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros((1, 4), dtype=torch.long)).logits.sum().backward()
    optimiser.step()
    lasting = {p.name: p.size for p in memory_footprint.memory(config(tmp_path), facts).lasting}
    grads = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = sum(s[name].nbytes for s in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert lasting["weights"] == sum(p.nbytes for p in model.parameters())
    assert (lasting["gradients"], lasting["optimiser"]) == (grads, moments)


@pytest.mark.parametrize("kind", ["llama", "qwen3_5"])
def test_what_decoding_remembers_is_what_a_cache_holds(kind: str, tmp_path: Path) -> None:
    model = toy.model(kind)
    model.save_pretrained(tmp_path)
    facts = memory_footprint.facts(config(tmp_path))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.get_decoder()(input_ids=torch.zeros((1, 50), dtype=torch.long), past_key_values=cache, use_cache=True)
    full = [layer for layer in cache.layers if hasattr(layer, "keys")]
    assert facts.cache * 50 == sum(layer.keys.numel() + layer.values.numel() for layer in full)
    linear = [layer for layer in cache.layers if not hasattr(layer, "keys")]
    states = sum(layer.recurrent_states[0].nbytes for layer in linear)
    inputs = (
        sum(layer.conv_states[0].numel() for layer in linear) * 3 // 4
    )  # vLLM keeps one less than the kernel's width
    assert facts.state == states + 2 * inputs


def test_checkpointing_lora_and_rows_change_the_parts_they_should(tmp_path: Path) -> None:
    toy.model("llama").save_pretrained(tmp_path)
    plain = config(tmp_path)
    facts = memory_footprint.facts(plain)
    without = memory_footprint.memory(plain, facts)
    saving = memory_footprint.memory(config(tmp_path, model={"gradient_checkpointing": True}), facts)
    parts = [{p.name: p.size for p in m.passing} for m in (without, saving)]
    assert parts[0]["activations"] == without.without_checkpointing > parts[1]["activations"]
    outside = 4 * facts.kept["outside"].row(200)
    assert parts[1]["activations"] == 2 * 800 * 64 * 4 + outside  # two layers' inputs of four rows of 200 tokens
    adapted = memory_footprint.facts(config(tmp_path, model={"lora": {"rank": 2}}))
    assert 0 < adapted.trained < adapted.parameters / 10
    assert adapted.parameters == facts.parameters + adapted.trained
    twice = memory_footprint.memory(config(tmp_path, tokens_per_microbatch=1600), facts)
    assert twice.without_checkpointing == 2 * without.without_checkpointing
    assert dataclasses.asdict(facts.kept["full_attention"])["square"] == 0


def test_a_config_json_that_is_not_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs config\.json"):
        memory_footprint.facts(config(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nothing_we_know"}')
    with pytest.raises(UserError, match=r"model.path: .*config.json: .*nothing_we_know"):
        memory_footprint.facts(config(tmp_path))


def test_the_meta_count_is_the_count_of_the_class_that_loads(tmp_path: Path) -> None:
    """A text-only folder and one with a vision tower are the same policy."""
    text = Qwen3_5TextConfig(**QWEN35_4B)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(text).parameters())
    assert memory_footprint.facts(config(released(tmp_path))).parameters == count
