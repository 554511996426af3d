"""What a run refuses before its first step, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer import toy
from tests.trainer.toy_run import config
from trainer import engines, loop
from trainer.config import EnvConfig, ModelConfig
from trainer.errors import UserError
from trainer.learning import model as policy


def test_an_unreachable_model_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: .* is not a folder"):
        loop.train(config(tmp_path / "nowhere", tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        loop.train(config(tmp_path / "empty", tmp_path / "run"))
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"has a config\.json and no weights"):
        loop.train(config(tmp_path / "empty", tmp_path / "run"))
    (tmp_path / "empty" / "model.safetensors").touch()
    with pytest.raises(UserError, match="cannot load"):
        loop.train(config(tmp_path / "empty", tmp_path / "run"))


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "garbage"])
def test_weights_that_do_not_fit_their_config_are_one_line(folder: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state, name = load_file(file), "model.norm.weight"
    match kind:
        case "missing":
            del state[name]
        case "unknown":
            state["vision.weight"] = torch.zeros(2)
        case "shape":
            state[name] = torch.zeros(2)
    save_file(state, file, metadata={"format": "pt"})
    if kind == "garbage":
        file.write_bytes(bytes(100))
    said = {"missing": name, "unknown": r"vision\.weight", "shape": r"norm\.weight as \[2\]", "garbage": "cannot load"}
    with pytest.raises(UserError, match=rf"model\.path: .*{said[kind]}"):
        loop.train(config(tmp_path / "model", tmp_path / "run"))


@pytest.mark.parametrize("fields", [{"eos_token_id": {"a": 0}}, {"num_attention_heads": 0}, {"hidden_act": "none"}])
def test_a_config_that_makes_no_model_is_one_line(folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(UserError, match=r"model\.path: cannot load"):
        loop.train(config(tmp_path / "model", tmp_path / "run"))


def test_a_tied_head_need_not_be_stored(tmp_path: Path) -> None:
    model = toy.model()
    model.save_pretrained(tmp_path)
    toy.tokenizer().save_pretrained(tmp_path)
    file, tied = tmp_path / "model.safetensors", tmp_path / "config.json"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if k != "lm_head.weight"}, file, metadata={"format": "pt"})
    tied.write_text(json.dumps({**json.loads(tied.read_text()), "tie_word_embeddings": True}))
    loaded, _, _ = policy.load(ModelConfig(path=str(tmp_path)))
    assert torch.equal(loaded.get_output_embeddings().weight, state["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["sdpaa", "flex"])
def test_an_unavailable_attention_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    given = ModelConfig(path=str(folder), max_length=200, attn_implementation=name)
    with pytest.raises(UserError, match=rf"model\.attn_implementation: .*'{name}'"):
        loop.train(config(folder, tmp_path / "run", model=given))


def test_a_model_that_no_engine_can_sample_from_is_one_line(folder: Path, tmp_path: Path) -> None:
    made = config(folder, tmp_path)
    model, _, renderer = policy.load(made.model)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UserError, match=r"model\.path: .*chunked_attention"):
        engines.make(made, model, renderer)


@pytest.mark.parametrize("key", ["train_split", "eval_split"])
def test_a_split_that_is_not_there_is_found_at_the_start(folder: Path, tmp_path: Path, key: str) -> None:
    env = EnvConfig(**{"name": "parity", key: "tset"})
    with pytest.raises(UserError, match=rf"env\.{key}: .*'tset'; its splits are train, dev"):
        loop.train(config(folder, tmp_path / "run", env=env))


def test_a_cut_distribution_is_not_trained_on(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"top_p: got 0\.9"):
        loop.train(config(folder, tmp_path / "run", top_p=0.9))
