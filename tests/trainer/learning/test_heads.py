"""Engines, trainer and model agree on log-probs, whatever a model does to its logits; what cannot be reproduced is
refused before anything is trained."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sgcd_kernels import CreditConfig, output_head
from tests.trainer import toy
from trainer.commands import main
from trainer.config import EnvConfig
from trainer.data import Completion, Sampling
from trainer.engines.hf import HFEngine
from trainer.engines.padded import PaddedEngine
from trainer.learning.model import layer_kinds
from trainer.learning.scoring import Scorer, prepare_samples
from trainer.learning.sft import Example, sft_loss
from trainer.rollout.episode import RolloutSetup
from trainer.rollout.siblings import run_group

RENDERER, TEMPERATURE = toy.renderer(), 0.7
SIZES = {
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "nanochat": {"final_logit_softcapping": 3.0},
    "phi": {},  # whose head has a bias
}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | MODELS[kind]), attn_implementation="eager")
    model = model.float().eval()
    head = model.get_output_embeddings()
    torch.nn.init.normal_(head.weight, std=0.5)
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


def own(model: Any, prompt: list[int], ids: list[int], temperature: float) -> torch.Tensor:
    """log p of `ids` by the model's own forward."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("kind", MODELS)
def test_engines_give_the_models_own_log_probs(kind: str) -> None:
    model, prompt = made(kind), [2, 9, 10, 7, 4]
    kinds = [PaddedEngine, *([HFEngine] if layer_kinds(model) == {"full_attention"} else [])]
    for engine in kinds:
        made_engine = engine(model, slots=4, stop_ids=[], max_length=64)
        sampling = Sampling(temperature=TEMPERATURE, max_tokens=12)
        found: list[Completion] = asyncio.run(made_engine.generate(prompt, 3, sampling))
        for completion in found:
            want = own(model, prompt, completion.ids, TEMPERATURE)
            torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_trainer_scores_the_models_own_log_probs(kind: str) -> None:
    model, suite = made(kind), toy.ParitySuite()
    engine = PaddedEngine(model, slots=4, stop_ids=RENDERER.stop_ids, max_length=120)
    setup = RolloutSetup(engine, suite, RENDERER, Sampling(TEMPERATURE, max_tokens=8), EnvConfig(max_turns=2), 120)
    group = asyncio.run(run_group(setup, suite.tasks("train")[0], 2))
    group.reference = "say w7 even"
    scorer = Scorer(model, output_head(model), RENDERER.pad_id, TEMPERATURE, CreditConfig())
    batch = scorer.forward(prepare_samples([group], [1.0, -1.0], suite, RENDERER))
    for scored in batch.unpack(scorer.without_loss(batch, scorer.score(batch))):
        rollout, at = scored.rollout, torch.tensor(scored.rollout.generated)
        taught = RENDERER.prompt(rollout.prompt_messages, rollout.tools, group.reference)
        for found, prompt in ((scored.student_logp, rollout.prompt_ids), (scored.teacher_logp, taught)):
            want = own(model, prompt, rollout.ids, TEMPERATURE)
            torch.testing.assert_close(found[at], want[at], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(rollout.logprobs)[at], scored.student_logp[at], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_fine_tuning_has_the_models_own_cross_entropy(kind: str) -> None:
    model, ids = made(kind), [2, 9, 10, 7, 4, 12, 13]
    loss = sft_loss(model, output_head(model), [Example(ids, [i > 2 for i in range(len(ids))])], 0)
    torch.testing.assert_close(loss.detach(), -own(model, ids[:3], ids[3:], 1.0).mean(), atol=2e-5, rtol=1e-5)


def saved(path: Path, model: Any) -> Path:
    """The model's folder, in a config."""
    model.save_pretrained(path / "model")
    toy.tokenizer().save_pretrained(path / "model")
    config = path / "config.yaml"
    config.write_text(f"output_dir: {path}/run\nmodel: {{path: {path}/model, max_length: 200}}\n")
    return config


def test_a_head_that_cannot_be_reproduced_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {**SIZES, "embedding_size": 64, "is_decoder": True}
    torch.manual_seed(0)
    config = saved(tmp_path, AutoModelForCausalLM.from_config(CONFIG_MAPPING["electra"](**sizes)))
    capsys.readouterr()
    assert main(["train", str(config)]) == 2
    (shown,) = "".join(capsys.readouterr()).strip().splitlines()
    assert "ElectraForCausalLM does not compute softcap" in shown and "generator_predictions.dense (Linear)" in shown


def test_a_model_without_sdpa_says_what_to_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(saved(tmp_path, made("gemma2")))
    capsys.readouterr()
    for command in ("check", "train"):
        assert main([command, config]) == 2
        said = "".join(capsys.readouterr())
        assert "has no sdpa; use --model.attn_implementation eager" in said and "Traceback" not in said
    assert main(["check", config, "--model.attn_implementation", "eager"]) == 0


def test_check_measures_the_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made("llama")
    model.lm_head.weight.data[3, 3] = float("nan")
    assert main(["check", str(saved(tmp_path, model))]) == 2
    (shown,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[1:2] == ["model"]]
    assert shown.startswith("FAIL") and "LlamaForCausalLM does not compute softcap" in shown
