"""The models people use, tiny and of random weights: a step each through the trainer, with adapters and without."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sgcd_kernels import CreditConfig
from tests.trainer import toy
from tests.trainer.toy_run import config, identical, kill_at_step_3, records
from trainer import engines, envs, loop
from trainer.config import Config, EnvConfig, LoraConfig, ModelConfig
from trainer.engines.hf import HFEngine
from trainer.engines.padded import PaddedEngine
from trainer.errors import UserError
from trainer.evaluation import command
from trainer.learning import model as policy
from trainer.learning.model import hidden_states
from trainer.preflight import config_file
from trainer.records import checkpoint

FAMILIES = ["llama", "qwen3", "qwen3_5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in [*FAMILIES, "sliding"]:
        found[kind] = tmp_path_factory.mktemp(kind)
        toy.model(kind).save_pretrained(found[kind])
        toy.tokenizer().save_pretrained(found[kind])
    return found


@pytest.fixture(autouse=True)
def _parity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(envs.SUITES, "parity", toy.__name__)


def small(folder: Path, output_dir: Path, lora: LoraConfig | None = None, **fields: Any) -> Config:
    model = ModelConfig(path=str(folder), max_length=200, lora=lora)
    return config(folder, output_dir, **{"model": model, "eval_on_start": False, "eval_steps": 0, **fields})


def saved(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, of the model or of its adapters."""
    newest = checkpoint.latest(run)
    assert newest is not None
    return {name: t for file in newest.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("kind", [*FAMILIES, "sliding"])
def test_a_step_of_sgcd(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Siblings, reference, student and teacher, credit, update; engine and trainer agree on what was sampled."""
    loop.train(small(folders[kind], tmp_path, max_steps=1))
    (line,) = records(tmp_path)
    assert line["by_group/trained"] == 3
    assert line["credit/mean_weight"] > 1
    assert line["credit/invalid"] == 0
    assert line["grad_norm"] > 0
    assert line["sampling/sampling_logp_difference/max"] < 1e-4
    before, after = load_file(folders[kind] / "model.safetensors"), saved(tmp_path)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []  # every tensor learns


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        *((kind, {}) for kind in FAMILIES),
        ("llama", {"lora": LoraConfig(rank=2)}),
        ("qwen3_5", {"autocast": "bfloat16"}),
    ],
)
def test_recomputing_layers_changes_no_bit(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, extra: dict[str, Any]
) -> None:
    """Two steps with model.gradient_checkpointing and without: one record, one set of weights; but layers run again."""
    forwards: list[bool] = []

    load, counts = policy.load, []

    def loaded(config: ModelConfig) -> Any:
        model, *others = load(config)
        model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
        return model, *others

    monkeypatch.setattr(policy, "load", loaded)
    runs = []
    for on in (False, True):
        model = ModelConfig(path=str(folders[kind]), max_length=200, gradient_checkpointing=on, **extra)
        runs.append(small(folders[kind], tmp_path / str(on), model=model, max_steps=2, tokens_per_microbatch=400))
        forwards.clear()
        loop.train(runs[-1])
        counts.append(forwards.count(True))
    assert records(runs[0].output_dir) == records(runs[1].output_dir)
    first, second = (saved(r.output_dir) for r in runs)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert counts[1] == 2 * counts[0] > 0, "each layer of a training forward is computed once more"


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_of_sgcd_in_workday(tmp_path: Path, kind: str) -> None:
    """The embedded world in its own words; random weights solve a task of class no_action now and then."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("trainer/assets/workday-tiny")
    tokenizer.save_pretrained(tmp_path / "model")
    toy.model(kind, vocab_size=len(tokenizer), scale=3.0).save_pretrained(tmp_path / "model")
    made = config_file.load(Path("configs/workday_sgcd.yaml")).model_copy(
        update={
            "model": ModelConfig(path=str(tmp_path / "model"), max_length=400),
            "env": EnvConfig(max_turns=1),
            "output_dir": tmp_path / "run",
            "credit": CreditConfig(d_floor=1e-3),
            "groups_per_step": 1,
            "max_resample_times": 12,
            "max_completion_length": 128,
            "eval_on_start": False,
            "eval_samples": 1,
            "max_steps": 1,
        }
    )
    loop.train(made)
    (line,) = records(tmp_path / "run")
    assert line["by_group/trained"] == 1
    assert line["credit/invalid"] == 0
    assert line["credit/mean_weight"] > 1
    assert line["grad_norm"] > 0
    assert line["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_killed_run_of_a_recurrent_model_resumes_to_the_same_bits(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (small(folders["qwen3_5"], tmp_path / name) for name in ("whole", "cut"))
    loop.train(whole)
    with monkeypatch.context() as patch:
        kill_at_step_3(patch, "update")
        with pytest.raises(KeyboardInterrupt):
            loop.train(cut)
    loop.train(cut)
    assert records(whole.output_dir) == records(cut.output_dir)
    assert identical(whole.output_dir, cut.output_dir)


def test_each_model_gets_its_engine(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, expected in {
        "llama": HFEngine,
        "qwen3": HFEngine,
        "qwen3_5": PaddedEngine,
        "sliding": PaddedEngine,
    }.items():
        made = small(folders[kind], tmp_path)
        model, _, renderer = policy.load(made.model)
        assert type(engines.make(made, model, renderer)) is expected


def released(folder: Path, tied: bool = False) -> Any:
    """Write a Qwen3.5 as it is released, with a vision tower and the decoder under another name; give the model."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {**toy.model("qwen3_5").config.to_dict(), "tie_word_embeddings": tied}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
    torch.manual_seed(0)
    both = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    whole = Qwen3_5ForConditionalGeneration(both).eval()
    if not tied:
        with torch.no_grad():
            whole.get_output_embeddings().weight.mul_(8.0)  # as in `toy.model`
    whole.save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return whole


def test_the_text_part_of_a_released_qwen3_5_is_loaded(tmp_path: Path) -> None:
    whole = released(tmp_path)
    assert any("visual" in name for name in load_file(tmp_path / "model.safetensors"))
    loaded, _, _ = policy.load(ModelConfig(path=str(tmp_path)))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = whole.model.language_model(input_ids=ids).last_hidden_state
        assert torch.equal(hidden_states(loaded, ids), expected)
    assert torch.equal(loaded.get_output_embeddings().weight, whole.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_of_a_released_qwen3_5_resumes_evaluates_and_loads_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """Its files keep other names than the model's own; transformers would write a checkpoint under those again."""
    from transformers import AutoModelForCausalLM

    released(tmp_path / "model", tied)
    whole, cut = (small(tmp_path / "model", tmp_path / n, max_completion_length=24) for n in ("whole", "cut"))
    loop.train(whole)
    with monkeypatch.context() as patch:
        kill_at_step_3(patch, "update")
        with pytest.raises(KeyboardInterrupt):
            loop.train(cut)
    loop.train(cut)
    assert records(whole.output_dir) == records(cut.output_dir)
    assert identical(whole.output_dir, cut.output_dir)

    newest = checkpoint.latest(whole.output_dir)
    assert newest is not None
    assert command.run(whole, newest).metrics["eval/parity/tasks"] == 3
    trained, _, _ = policy.load(whole.model)
    before = {name: t.clone() for name, t in trained.state_dict().items()}
    checkpoint.load(newest, model=trained)
    assert not any(torch.equal(t, before[name]) for name, t in trained.state_dict().items())
    for again in (AutoModelForCausalLM.from_pretrained(newest), policy.load(ModelConfig(path=str(newest)))[0]):
        assert again.state_dict().keys() == before.keys()
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in trained.state_dict().items())


# Adapters

LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_trains_the_adapters_alone(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    pytest.importorskip("peft", reason="peft is not installed; make test installs it")
    run = loop.Run.open(small(folders[kind], tmp_path, LORA, max_steps=1))
    base = {n: t.clone() for n, t in run.model.state_dict().items() if ".lora_" not in n}
    asyncio.run(run.train())
    (line,) = records(tmp_path)
    assert (line["by_group/trained"], line["credit/invalid"]) == (3, 0)
    assert line["sampling/sampling_logp_difference/max"] < 1e-4
    after = run.model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in base.items())
    assert run.model.get_output_embeddings().weight.grad is None
    adapters = saved(tmp_path)
    assert all(".lora_" in name for name in adapters)
    assert all(bool(t.any()) for name, t in adapters.items() if "lora_B" in name)  # they begin at 0
    moments = {id(p) for group in run.learner.optimiser.param_groups for p in group["params"]}
    assert moments == {id(p) for n, p in run.model.named_parameters() if ".lora_" in n}


def test_adapters_change_nothing_before_the_first_step(folders: dict[str, Path]) -> None:
    pytest.importorskip("peft", reason="peft is not installed; make test installs it")
    plain, _, _ = policy.load(ModelConfig(path=str(folders["qwen3"])))
    adapted, _, _ = policy.load(ModelConfig(path=str(folders["qwen3"]), lora=LORA))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(hidden_states(plain, ids), hidden_states(adapted, ids))


@pytest.mark.parametrize("killed_in", ["update", "save"])
def test_a_killed_run_with_adapters_resumes_to_the_same_bits(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    """Twice interrupted: were the adapters merged at each start, the base would drift."""
    pytest.importorskip("peft", reason="peft is not installed; make test installs it")
    whole, cut = (small(folders["llama"], tmp_path / name, LORA) for name in ("whole", "cut"))
    loop.train(whole)
    loop.train(cut.model_copy(update={"max_steps": 1}))
    with monkeypatch.context() as patch:
        kill_at_step_3(patch, killed_in)
        with pytest.raises(KeyboardInterrupt):
            loop.train(cut)
    loop.train(cut)
    steps = [
        [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in records(c.output_dir)]
        for c in (whole, cut)  # the run that ended at step 1 was evaluated there
    ]
    assert steps[0] == steps[1]
    first, second = saved(whole.output_dir), saved(cut.output_dir)
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    resumed = loop.Run.open(cut)
    base = load_file(folders["llama"] / "model.safetensors")
    now = {n.replace(".base_layer.", "."): t for n, t in resumed.model.state_dict().items()}
    assert all(torch.equal(t, now[n]) for n, t in base.items())


def test_a_checkpoint_of_adapters_loads_elsewhere(folders: dict[str, Path], tmp_path: Path) -> None:
    """With transformers onto its base, and merged by peft for a server: the same policy each time."""
    peft = pytest.importorskip("peft", reason="peft is not installed; make test installs it")
    from transformers import AutoModelForCausalLM

    run = loop.Run.open(small(folders["llama"], tmp_path, LORA, max_steps=1))
    asyncio.run(run.train())
    newest = checkpoint.latest(tmp_path)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        ours = hidden_states(run.model, ids)
        again = AutoModelForCausalLM.from_pretrained(newest)
        assert torch.equal(hidden_states(again, ids), ours)
        base = AutoModelForCausalLM.from_pretrained(folders["llama"])
        assert not torch.allclose(hidden_states(base, ids), ours, atol=1e-4)
        merged = peft.PeftModel.from_pretrained(base, newest).merge_and_unload()
        torch.testing.assert_close(hidden_states(merged, ids), ours, atol=1e-5, rtol=1e-5)


def test_adapters_and_weights_are_not_mixed_up(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed; make test installs it")
    loop.train(small(folders["llama"], tmp_path / "full", max_steps=1))
    adapted, _, _ = policy.load(ModelConfig(path=str(folders["llama"]), lora=LORA))
    newest = checkpoint.latest(tmp_path / "full")
    assert newest is not None
    with pytest.raises(UserError, match="does not match the model"):
        checkpoint.load(newest, model=adapted)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["no_such_layer"]])
def test_targets_that_cannot_be_adapted_are_one_line(folders: dict[str, Path], targets: list[str]) -> None:
    pytest.importorskip("peft", reason="peft is not installed; make test installs it")
    wanted = LoraConfig(target_modules=targets)
    with pytest.raises(UserError, match=r"^model\.lora\.target_modules: ") as caught:
        policy.load(ModelConfig(path=str(folders["llama"]), lora=wanted))
    assert "\n" not in str(caught.value)


# What needs a GPU or a package


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [("attn_implementation", "flash_attention_2", "sdpa"), ("use_liger_kernel", True, "false")],
)
def test_a_missing_gpu_is_one_line(folders: dict[str, Path], field: str, value: Any, remedy: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    given = ModelConfig(path=str(folders["llama"]), autocast="bfloat16", **{field: value})
    with pytest.raises(UserError, match=rf"^model\.{field}: {value} needs a GPU.*--model\.{field} {remedy}$"):
        policy.load(given)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attn_implementation": "flash_attention_2"}, "computes in 16 bits only; use --model.autocast bfloat16"),
        ({"attn_implementation": "flash_attention_2", "autocast": "bfloat16"}, "pip install flash-attn"),
        ({"use_liger_kernel": True}, r"pip install 'sgcd-kernels\[gpu\]'"),
        ({"lora": LORA}, r"pip install 'sgcd-kernels\[lora\]'"),
    ],
    ids=["bits", "flash", "liger", "peft"],
)
def test_a_missing_package_is_one_line(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], said: str
) -> None:
    """On a machine with a GPU, as far as the checks can see, and without the package."""
    for package in ("flash_attn", "liger_kernel", "peft"):
        monkeypatch.setitem(sys.modules, package, None)
    given = ModelConfig(path=str(folders["llama"]), **fields)
    with monkeypatch.context() as patch:
        if "lora" not in fields:
            patch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(UserError, match=said):
            policy.load(given)


def test_the_config_is_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {renderer: template, chat_template_kwargs: {enable_thinking: false}}\n")
    made = config_file.load(file, ["--model.lora.rank", "8", "--model.lora.target_modules", "[q_proj, v_proj]"])
    assert made.model.lora == LoraConfig(rank=8, target_modules=["q_proj", "v_proj"])
    assert Config.model_validate(json.loads(json.dumps(config_file.dump(made)))) == made
    with pytest.raises(UserError, match=r"unknown key 'model\.lora\.rnk'; did you mean 'model\.lora\.rank'"):
        config_file.load(file, ["--model.lora.rnk", "8"])
