"""The examples run unchanged, and credit has an effect in them."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sgcd_kernels import credit_weights, reference

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def output_of(example: str, *arguments: str, folder: Path = EXAMPLES.parent) -> str:
    """What an example prints; it imports this library, wherever that is installed."""
    command = [sys.executable, "-W", "error::RuntimeWarning", str(EXAMPLES / example), *arguments]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(after: str, text: str) -> list[float]:
    return [float(x) for x in re.findall(rf"{after} ([0-9.e-]+)", text)]


SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "RecurrentGemma": {"logits_soft_cap": 3.0, "lru_width": 32, "block_types": ["recurrent", "attention"]},
    "Phi": {},  # whose head has a bias
    "Granite": {"logits_scaling": 8.0},
    "Electra": {"embedding_size": 32, "is_decoder": True},  # a dense layer and a norm before its head
}


def saved(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a small model, with a head that prefers some vocab ids, for `from_pretrained`."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SIZES | HEADS | MODELS[name] | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    head = model.get_output_embeddings()
    head.weight.data.normal_(std=0.3)
    if head.bias is not None:
        head.bias.data.normal_()
    model.save_pretrained(folder)
    return folder


def run_in_here(monkeypatch: pytest.MonkeyPatch, example: str, *arguments: str | Path) -> dict[str, Any]:
    """The example's variables when it is done."""
    monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / example), run_name="__main__")


def test_plain_pytorch() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    said = output_of("plain_pytorch.py")
    weights, losses = numbers("mean W", said), numbers("loss", said)
    assert len(weights) == 3 and all(1.1 < w < 1.9 for w in weights), "credit is absent, or everywhere the same"
    assert all(abs(loss) > 0.01 for loss in losses), "0: on the first step that is one W for all tokens"


@pytest.mark.parametrize("name", ["Gemma2", "RecurrentGemma", "Phi", "Granite"])
def test_plain_pytorch_scores_the_model_that_it_is_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first divergence is that of the model's own logits, one answer at a time: softcap, bias, scale, no leak."""
    from transformers import AutoModelForCausalLM

    saved(name, tmp_path)
    used = run_in_here(monkeypatch, "plain_pytorch.py", tmp_path)
    model, d = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), []
    for answer in used["answers"]:
        prompts = (used["prompt"], used["reference"] + used["prompt"])
        with torch.no_grad():
            p, q = (model(torch.tensor([x + answer])).logits[0, len(x) - 1 : -1].double() for x in prompts)
        d.append(reference.kl(p, q))
    found = numbers("mean KL", capsys.readouterr().out)[0]
    assert found > 1e-3 and found == pytest.approx(torch.cat(d).mean().item(), rel=2e-3)


@pytest.mark.parametrize("example", ["plain_pytorch.py", "distill_gkd.py"])
def test_a_head_that_is_more_than_a_matrix_is_refused(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"ElectraForCausalLM does not compute .*generator_predictions.dense"):
        run_in_here(monkeypatch, example, saved("Electra", tmp_path))


def test_trl_sgcd(tmp_path: Path) -> None:
    for package in ("trl", "datasets"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    said = output_of("trl_sgcd.py", folder=tmp_path)
    weights, referenced = numbers("mean W", said), numbers("referenced", said)
    assert len(weights) == 3 and all(w > 1 for w in weights)
    assert any(share > 0 for share in referenced)
    rewards = numbers("reward", said)
    assert any(0 < reward < 1 for reward in rewards), "no group was mixed, so no reference was written"


def test_distill_gkd() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    divergences = numbers("JSD", output_of("distill_gkd.py"))
    assert len(divergences) == 10 and divergences[-1] < 0.7 * divergences[0]


def test_distill_gkd_lets_no_token_see_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states that it compares are those of the rows without their padding."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    used = run_in_here(monkeypatch, "distill_gkd.py")
    padded = (used["prompts"] == used["PAD"]).sum(1)
    assert padded[0] == 2 and padded[1] == 0
    for row, pads in enumerate(padded):
        ids = used["ids"][row : row + 1, pads:]
        with torch.no_grad():
            alone = used["teacher"].get_decoder()(input_ids=ids).last_hidden_state[0, used["start"] - pads : -1]
        torch.testing.assert_close(used["taught"][row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Gemma2", "Phi"])
def test_distill_gkd_compares_the_models_that_it_is_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last divergences are those of both models' own logits, but for the student's last small step."""
    student, teacher = (saved(name, tmp_path / str(seed), seed) for seed in (0, 1))
    used = run_in_here(monkeypatch, "distill_gkd.py", student, teacher)
    with torch.no_grad():
        p, q = (used[who](**used["inputs"]).logits[:, used["start"] : -1].double() for who in ("student", "teacher"))
    want = reference.jsd(p, q)
    assert want.mean() > 0.01
    torch.testing.assert_close(used["divergence"].double(), want, rtol=1e-2, atol=1e-4)


def test_distill_gkd_refuses_two_softcaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (saved("Gemma2", tmp_path / str(cap), final_logit_softcapping=cap) for cap in (3.0, 5.0))
    with pytest.raises(SystemExit, match=r"are \(1\.0, 3\.0\) for the student, \(1\.0, 5\.0\) for the teacher"):
        run_in_here(monkeypatch, "distill_gkd.py", *pair)


@pytest.fixture(scope="module")
def heat_map() -> str:
    pytest.importorskip("transformers", reason="transformers is not installed")
    return output_of("score_rollouts.py", "--color", "always")


def test_score_rollouts_tells_the_truth(heat_map: str) -> None:
    """Its d, H and W are those of full logits, by the model's own head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    defaults = runpy.run_path(str(EXAMPLES / "score_rollouts.py"))
    model = AutoModelForCausalLM.from_pretrained(defaults["TINY"], dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(defaults["TINY"])
    response = [tokenizer(part).input_ids for part in defaults["RESPONSE"]]
    ids = [token for tokens in response for token in tokens]
    logits = []
    for prompt in (defaults["TASK"], defaults["REFERENCE"] + defaults["TASK"]):
        tokens = tokenizer(prompt).input_ids
        with torch.no_grad():
            logits.append(model(torch.tensor([tokens + ids])).logits[0, len(tokens) - 1 : -1])
    part = torch.tensor([i for i, tokens in enumerate(response) for _ in tokens])
    d, h = reference.kl(*logits), reference.logprob(logits[1], torch.tensor(ids))[1]
    w = credit_weights(d, h, torch.tensor([0, len(ids)]), mask=part % 2 == 0, turn_ids=part).weights
    plain = re.sub(r"\x1b\[[0-9;]*m", "", heat_map)
    numbers = re.findall(r"^'.*?' +([0-9.]+) +([0-9.]+) +([0-9.]+)", plain, re.MULTILINE)
    got = torch.tensor([[float(x) for x in row] for row in numbers], dtype=torch.float64)
    torch.testing.assert_close(got, torch.stack([d, h, w], dim=1), rtol=1e-3, atol=6e-4)


def test_score_rollouts_colours_the_salient_tokens(heat_map: str) -> None:
    """Reddest where W is at its ceiling, on the deletion; white at W = 1; grey what was observed."""
    first = heat_map.splitlines()[0]
    by_word = {word: colour for colour, word in re.findall(r"\x1b\[([0-9;]+)m([^\x1b]+)\x1b", first)}
    assert by_word["files_delete"] == "30;48;2;255;80;55" and by_word["files_find"] == "30;48;2;255;255;255"
    assert by_word["ok"] == "90" and len(set(by_word.values())) == 3


def test_score_rollouts_without_a_reference_is_white(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    task = "<user> delete the census file <end> <assistant>"
    monkeypatch.setattr(sys, "argv", ["score_rollouts.py", "--student", task, "--teacher", task])
    runpy.run_path(str(EXAMPLES / "score_rollouts.py"), run_name="__main__")
    found = capsys.readouterr().out
    assert "\x1b" not in found and "mean W 1.000 over 21 tokens" in found


def test_score_rollouts_refuses_what_it_cannot_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(runpy.run_path(str(EXAMPLES / "score_rollouts.py"))["TINY"])
    saved("Electra", tmp_path, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"^ElectraForCausalLM does not compute softcap"):
        run_in_here(monkeypatch, "score_rollouts.py", "--model", tmp_path)


def test_verl_policy_loss() -> None:
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    found = output_of("verl/policy_loss.py")
    slopes = dict(re.findall(r"^(vanilla|sgcd) .*tokens \[(.*)\]$", found, re.MULTILINE))
    plain, weighted = (torch.tensor([float(x) for x in slopes[mode].split(",")]) for mode in ("vanilla", "sgcd"))
    torch.testing.assert_close(weighted, plain * torch.tensor([1.0] * 5 + [2.0] * 3), rtol=0, atol=2e-3)
    assert "W of the first response [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]" in found
