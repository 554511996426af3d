"""The commands as a user runs them: a process, its exit code, and its output."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.trainer import toy
from trainer.commands import main
from trainer.evaluation import command
from trainer.preflight import config_file
from trainer.records import checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = "configs/workday_sgcd.yaml"


def run(
    *arguments: str, as_file: bool = False, block: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository; `block` names a package that shall not be importable."""
    call = ["trainer/run.py"] if as_file else ["-m", "trainer.run"]
    if block:
        hide = f"import sys; sys.modules[{block!r}] = None; sys.argv = ['run', *sys.argv[1:]]"
        call = ["-c", f"{hide}; from trainer.commands import main; sys.exit(main())"]
    return subprocess.run(
        [sys.executable, *call, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in lines[0]


def test_help_says_what_there_is() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("train", "eval", "view", "check", "--key value"))
    assert run().returncode == 2


@pytest.mark.parametrize("as_file", [False, True], ids=["module", "file"])
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian", CONFIG], ["'trian'", "train, eval, view, check"]),
        (["train"], ["needs a config file"]),
        (["train", "configs/workday_sgdc.yaml"], ["no such file", "did you mean configs/workday_sgcd.yaml"]),
        (["train", CONFIG, "--seed"], ["--seed", "needs a value"]),
        (["train", CONFIG, "seed=3"], ["'seed=3'", "--key value"]),
    ],
    ids=["command", "no-config", "no-file", "no-value", "no-dashes"],
)
def test_a_usage_error_is_one_line_and_immediate(
    arguments: list[str], parts: list[str], as_file: bool, tmp_path: Path
) -> None:
    """Before anything imports torch, which takes seconds."""
    (tmp_path / "torch.py").write_text("raise AssertionError('torch is imported')")
    assert_one_line(run(*arguments, as_file=as_file, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"), *parts)


@pytest.mark.parametrize("command", ["train", "eval", "check"])
def test_a_model_path_that_leads_nowhere(tmp_path: Path, command: str) -> None:
    done = run(command, CONFIG, "--model.path", str(tmp_path / "gone"), "--output_dir", str(tmp_path / "run"))
    if command == "check":  # it runs the other checks and shows a table
        assert done.returncode == 2 and "model.path" in done.stdout and "Traceback" not in done.stderr
    else:
        assert_one_line(done, "model.path", "gone")


def test_another_config_in_the_run_directory(tmp_path: Path) -> None:
    config_file.claim(config_file.load(ROOT / CONFIG, ["--output_dir", str(tmp_path)]))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    done = run("train", CONFIG, "--output_dir", str(tmp_path), "--seed", "9")
    assert_one_line(done, "holds another run", "seed is 0 there and 9 here", "--output_dir")


def test_two_trainings_in_one_directory(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_one_line(run("train", CONFIG, "--output_dir", str(tmp_path)), "another process is training there")


@pytest.mark.parametrize("block", ["yaml", "transformers"])
def test_a_missing_package_names_its_extra(tmp_path: Path, block: str) -> None:
    done = run("eval", CONFIG, "--output_dir", str(tmp_path), block=block)
    assert_one_line(done, f"the package {block} is not installed", "sgcd-kernels[trainer]")


def test_an_unknown_key_names_the_nearest_and_repeats_no_secret(tmp_path: Path) -> None:
    key = "sk-verysecret123"
    done = run("train", CONFIG, "--writer.api_key", key, "--output_dir", str(tmp_path / "run"), OPENAI_API_KEY=key)
    assert_one_line(done, "unknown key 'writer.api_key'", "'writer.api_key_env'")
    assert key not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_ctrl_c_is_one_line_and_the_run_resumes_later(tmp_path: Path) -> None:
    toy.model().save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "run"
    small = {
        "model.path": tmp_path / "model", "output_dir": out, "groups_per_step": 1, "num_generations": 2,
        "dynamic_sample": False, "max_completion_length": 8, "env.max_turns": 1, "save_steps": 1, "trace_steps": 0,
        "eval_steps": 0, "eval_on_start": False,
    }  # fmt: skip
    arguments = ["train", CONFIG, *(f"--{key}={value}" for key, value in small.items())]
    with subprocess.Popen(
        [sys.executable, "-m", "trainer.run", *arguments, "--max_steps=100000"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore Ctrl-C, and their children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as child:  # fmt: skip
        assert child.stdout is not None
        while not child.stdout.readline().startswith("checkpoint"):
            assert child.poll() is None, child.stderr and child.stderr.read()
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=600)
    assert child.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted: the same command resumes from the newest checkpoint"
    assert "Traceback" not in said
    newest = checkpoint.latest(out)
    assert newest is not None
    done = int(newest.name.removeprefix("step_"))
    finished = run(*arguments, f"--max_steps={done + 2}")
    assert finished.returncode == 0, finished.stderr
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, done + 3)), "no step is missing or there twice"
    assert finished.stdout.splitlines()[-1] == f"view: {out / 'view.html'}"


def test_eval_takes_a_run_a_checkpoint_or_a_config_and_never_the_wrong_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Path | None] = []
    monkeypatch.setattr(command, "run", lambda config, weights: asked.append(weights))
    config_file.claim(config_file.load(ROOT / CONFIG, ["--output_dir", str(tmp_path)]))
    assert main(["eval", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    policy = torch.nn.Linear(1, 1)
    policy.save_pretrained = lambda folder, **options: save_file(policy.state_dict(), f"{folder}/model.safetensors")
    optimiser = torch.optim.SGD(policy.parameters())
    steps = [checkpoint.save(tmp_path, n, model=policy, optimiser=optimiser) for n in (1, 2)]
    assert [main(["eval", str(p)]) for p in (tmp_path, steps[0], tmp_path / "config.yaml")] == [0, 0, 0]
    assert asked == [steps[1], steps[0], None]
    (steps[1] / "model.safetensors").write_bytes(b"")
    assert main(["eval", str(tmp_path)]) == 0 and asked[-1] == steps[0]
    assert "step_2: damaged checkpoint (model.safetensors has 0 bytes" in capsys.readouterr().err
