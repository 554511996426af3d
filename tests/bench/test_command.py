"""The command line: what it refuses in one line, and what it would measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import providers, timing
from bench.cases import HEADS, OPS, PRODUCTS, cpu_selection, gpu_selection, modes_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--op", "nonsense"], f"unknown op 'nonsense'; there are {', '.join(OPS)}"),
        (["run", "--shape", "gpt5"], f"unknown shape 'gpt5'; there are {', '.join(HEADS)}"),
        (["run", "--provider", "magic"], "unknown provider 'magic'; there are triton, "),
        (["run", "--mode", "sideways"], "unknown mode 'sideways'; there are forward, backward, full"),
        (["run", "--metric", "beauty"], "unknown metric 'beauty'; there are speed, memory, error"),
        (["run", "--dtype", "int8"], "unknown dtype 'int8'; there are fp32, bf16, fp16"),
        (["run", "--device", "tpu"], "unknown device 'tpu'; there are auto, cpu, cuda"),
        (["run", "--tokens", "0"], "--tokens: got 0, needs at least 1"),
        (["run", "--samples", "0"], "--samples: got 0, needs at least 1"),
        (["run", "--op", "credit", "--mode", "backward", "--device", "cpu"], "credit has forward"),
        (["run", "--with", "nowhere.py"], "--with: nowhere.py is not a Python file"),
        (["verify", "--op", "nonsense"], "unknown op 'nonsense'"),
        (
            ["train", "--provider", "first_call/nobody"],
            "unknown provider 'first_call/nobody'; there are first_call/ours",
        ),
        (["train", "--steps", "0"], "--steps: got 0, needs at least 1"),
        (["plot", "--results", "/nowhere"], "no results in /nowhere"),
        (
            ["figure", "--results", "/nowhere"],
            "the figure needs times for two numbers of tokens",
        ),
        (["dance"], "invalid choice: 'dance'"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    out = capsys.readouterr()
    assert out.out == "" and says in out.err and out.err.count("\n") == 1


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert command.main(["run", "--device", "cpu", "--dtype", "fp32", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_selection_narrows_and_named_shapes_leave_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(planned(capsys)) == len(cpu_selection(("fp32",)))
    assert all(line.startswith("divergence") for line in planned(capsys, "--op", "divergence"))
    assert planned(capsys, "--op", "logprob", "--mode", "backward") == ["logprob backward smollm2 N=128 fp32"]
    lines = planned(capsys, "--op", "distill", "--shape", "tiny", "llama3", "--tokens", "64", "32")
    assert len(lines) == 8 and "distill full llama3 N=32 fp32" in lines
    assert {line.split()[0] for line in planned(capsys, "--provider", "quack")} == {"cross_entropy"}


def seconds_on_a_gpu() -> float:
    """A cautious guess for an H200: every provider at twice the matmul baseline, compilation, the fp64 answers."""
    providers.load()
    elsewhere = {"cpp", "cpp-lse", "sweep", "reference"}
    total = 0.0
    for case in gpu_selection():
        unit = 2 * 0.7 * case.tokens * case.head.hidden * case.head.vocab
        count = len({p.name for p in providers.providers_of(case.op)} - elsewhere)
        once = 2 * PRODUCTS[case.op][case.mode] * unit / 400e12
        total += count * ((2 + timing.samples_for(once)) * once + 0.3) + 2 * unit / 40e12
    return total + 25 * len({c.op for c in gpu_selection()} - {"credit"})


def test_the_gpu_matrix_fits_eight_minutes_and_covers_what_is_owed() -> None:
    assert seconds_on_a_gpu() < 450
    cases = gpu_selection()
    assert {c.op for c in cases} == set(OPS)
    assert {c.shape for c in cases} == {"smollm2", "llama3", "qwen3-8b", "qwen3.5-4b"}
    assert {c.tokens for c in cases} >= {1024, 4096, 16_384, 65_536}
    assert all(c.dtype == "bf16" and c.device == "cuda" for c in cases)
    assert len(set(cases)) == len(cases) and len(set(cpu_selection(("fp32",)))) == len(cpu_selection(("fp32",)))


def test_every_op_has_a_matmul_baseline_and_ours_and_a_plain_one() -> None:
    providers.load()
    for op in OPS:
        names = {p.name for p in providers.providers_of(op)}
        assert names >= (
            {"ours", "reference"} if op == "credit" else {"triton", "cpp", "torch", "eager", "compile", "matmul"}
        )
        assert set(modes_of(op)) <= {"forward", "backward", "full"}


def test_tables_need_no_torch() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom bench.__main__ import main\nsys.exit(main(['table', '--check']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "table", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
