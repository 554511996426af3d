"""The examples run as they are, and credit does something in them."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgcd_kernels import credit_weights, reference

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def output_of(example: str, *arguments: str, folder: Path = EXAMPLES.parent) -> str:
    """What an example prints; it imports this library, wherever that is installed."""
    command = [sys.executable, "-W", "error::RuntimeWarning", str(EXAMPLES / example), *arguments]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(after: str, text: str) -> list[float]:
    return [float(x) for x in re.findall(rf"{after} ([0-9.e-]+)", text)]


def test_plain_pytorch() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    weights = numbers("mean W", output_of("plain_pytorch.py"))
    assert len(weights) == 3 and all(w > 1 for w in weights)


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


def test_verl_policy_loss() -> None:
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    found = output_of("verl/policy_loss.py")
    slopes = dict(re.findall(r"^(vanilla|sgcd) .*tokens \[(.*)\]$", found, re.MULTILINE))
    plain, weighted = (torch.tensor([float(x) for x in slopes[mode].split(",")]) for mode in ("vanilla", "sgcd"))
    torch.testing.assert_close(weighted, plain * torch.tensor([1.0] * 5 + [2.0] * 3), rtol=0, atol=2e-3)
    assert "W of the first response [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]" in found
