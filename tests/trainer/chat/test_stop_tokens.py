"""Every end that a model folder names ends a turn, in every engine and reader, and none leaks into the text."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainer import toy
from tests.trainer.chat.test_chatml import SYSTEM, TOOL, USER, make_tokenizer
from trainer import chat
from trainer.chat.chatml import ChatMLRenderer
from trainer.config import ModelConfig
from trainer.data import Sampling, TokenClass
from trainer.engines.hf import HFEngine
from trainer.engines.padded import PaddedEngine
from trainer.learning import model as policy

END, ENDOFTEXT = "<|im_end|>", "<|endoftext|>"


def folder(path: Path, config: Any = None, generation: Any = None, text: bool = False) -> Path:
    """A tiny ChatML policy whose config.json and generation_config.json name these ends."""
    words = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=None, **sizes)).save_pretrained(path)
    words.save_pretrained(path)
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        file = path / name
        stored = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**stored, "eos_token_id": value}))
    return path


def loaded(path: Path) -> tuple[Any, Any, Any]:
    return policy.load(ModelConfig(path=str(path), renderer="chatml", max_length=64))


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (None, None, {END}),
        (None, [2, 0], {END, ENDOFTEXT}),
        (0, None, {END, ENDOFTEXT}),
        ([2, 0], 2, {END, ENDOFTEXT}),
        (2, 0, {END, ENDOFTEXT}),
        (-1, [10**6, -5], {END}),
        ([], [], {END}),
        (None, True, {END}),
        (None, [[0]], {END}),
    ],
)
def test_the_ends_of_a_folder_are_joined(tmp_path: Path, config: Any, generation: Any, ends: set[str]) -> None:
    _, tokenizer, renderer = loaded(folder(tmp_path, config, generation))
    assert renderer.stop_ids == frozenset(tokenizer.convert_tokens_to_ids(sorted(ends)))


def test_the_tokenizers_end_is_one_of_them(tmp_path: Path) -> None:
    file = folder(tmp_path) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": ENDOFTEXT}))
    _, tokenizer, renderer = loaded(tmp_path)
    assert renderer.stop_ids == frozenset(tokenizer.convert_tokens_to_ids([END, ENDOFTEXT]))


@pytest.mark.parametrize("kind", [HFEngine, PaddedEngine])
def test_engines_stop_at_each_of_them(kind: Any, tmp_path: Path) -> None:
    model, tokenizer, renderer = loaded(folder(tmp_path, [2, 0]))
    endoftext = tokenizer.convert_tokens_to_ids(ENDOFTEXT)
    with torch.no_grad():  # it wants nothing but this end
        states = model.get_decoder()(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
        model.lm_head.weight[endoftext] = 50 * states / states.norm()
    engine = kind(model, slots=2, stop_ids=renderer.stop_ids, max_length=64)
    (got,) = asyncio.run(engine.generate([5, 6, 7], 1, Sampling(temperature=0, max_tokens=8)))
    assert (got.ids, got.finish) == ([endoftext], "stop")


@pytest.mark.parametrize("name", ["chatml", "compact"])
def test_readers_take_either_end(name: str) -> None:
    if name == "chatml":
        tokenizer = make_tokenizer()
        other = tokenizer.convert_tokens_to_ids(ENDOFTEXT)
    else:
        tokenizer = toy.tokenizer()
        other = tokenizer.convert_tokens_to_ids("<pad>")
    renderer: Any = chat.load(name, tokenizer, stop_ids=[other])
    own = next(iter(renderer.stop_ids - {other}))
    said = renderer.encode("Done.") if name == "chatml" else renderer.encode(["say", "w1"])
    assert renderer.parse([*said, other]) == renderer.parse([*said, own]) == renderer.parse(said)
    assert renderer.classes([*said, other]) == renderer.classes([*said, own])
    assert renderer.classes([*said, other])[-1] == TokenClass.FORMAT


def test_chatml_begins_as_its_tokenizer_does() -> None:
    tokenizer = make_tokenizer()
    plain = ChatMLRenderer(tokenizer).prompt([SYSTEM, USER], [TOOL])
    bos = tokenizer.convert_tokens_to_ids(ENDOFTEXT)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{ENDOFTEXT} $A", special_tokens=[(ENDOFTEXT, bos)]
    )
    renderer = ChatMLRenderer(tokenizer)
    for reference in ("", "look first"):
        assert renderer.prompt([SYSTEM, USER], [TOOL], reference).count(bos) == 1
    assert renderer.prompt([SYSTEM, USER], [TOOL]) == [bos, *plain]
    assert bos not in renderer.observation([USER]) and bos not in renderer.turn({"role": "assistant", "content": "a"})


def test_a_template_writes_its_own_beginning() -> None:
    """One BOS where the template has it and the tokenizer adds it too, as in `apply_chat_template`."""
    tokenizer = make_tokenizer()
    bos = tokenizer.convert_tokens_to_ids(ENDOFTEXT)
    tokenizer.bos_token = ENDOFTEXT
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{ENDOFTEXT} $A", special_tokens=[(ENDOFTEXT, bos)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ids = chat.load("template", tokenizer).prompt([USER], [])
    assert ids.count(bos) == 1 and ids[0] == bos
