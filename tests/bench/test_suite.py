"""Providers that throw, run out of memory, are wrong or die: their row says so, and the suite continues."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import providers, results, suite
from bench.cases import OPS, Case, modes_of

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "bench" / "fakes.py"
CASE = Case("divergence", "forward", "tiny", 64, "fp32")


@pytest.fixture(autouse=True)
def load_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    providers.load()  # the suite's own register once in a process, and must outlive this test
    monkeypatch.setattr(providers, "_PROVIDERS", dict(providers._PROVIDERS))
    providers.load((FAKES,))


def run(*names: str, metrics: tuple[str, ...] = ("speed", "error"), case: Case = CASE) -> dict[str, results.Row]:
    chosen = [p for p in providers.providers_of(case.op) if p.name in names]
    assert len(chosen) == len(names)
    return {row.provider: row for row in suite.run_case(case, chosen, metrics=metrics, samples=3)}


def test_a_bad_provider_costs_its_own_row_only() -> None:
    found = run("throws", "greedy", "wrong", "nan", "empty", "right", "matmul")
    assert found["throws"].status == "threw ValueError: no such thing"
    assert found["greedy"].status == "out of memory"
    assert found["wrong"].status.startswith("wrong: ")
    assert "reverse_kl off by" in found["wrong"].status or "teacher_entropy off by" in found["wrong"].status
    assert found["nan"].status.startswith("wrong: reverse_kl off by nan")
    assert found["empty"].status == "wrong: it returned no teacher_entropy"
    for name in ("throws", "greedy", "wrong", "nan", "empty"):
        assert found[name].median_ms is None and found[name].matmul_ratio is None, name
    right = found["right"]
    assert right.status == results.OK and right.median_ms and right.p20_ms and right.p80_ms
    assert right.p20_ms <= right.median_ms <= right.p80_ms
    assert right.samples == 3 and right.repeats > 1, "a tiny case is too short for the timer"
    assert right.matmul_ratio == pytest.approx(right.median_ms / (found["matmul"].median_ms or 0))
    flop = 2 * 2 * right.kept * right.H * right.V
    assert right.tflops == pytest.approx(flop / right.median_ms / 1e9)
    assert 0 < (right.error or 0) < 1e-4


def test_a_provider_that_throws_while_it_is_timed_loses_its_time() -> None:
    calls = 0

    @providers.provides("divergence", "tires")
    def tires(i: object, mode: str) -> providers.Outputs:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("enough")
        return next(p for p in providers.providers_of("divergence") if p.name == "right").run(i, mode)  # type: ignore[arg-type]

    found = run("tires", "right")
    assert found["tires"].status == "threw RuntimeError: enough" and found["tires"].median_ms is None
    assert found["right"].status == results.OK and found["right"].median_ms


def test_who_is_not_here_says_so_and_is_never_called() -> None:
    found = run("triton", "right", metrics=("error",))
    assert found["triton"].status.startswith("not usable here: ")
    assert found["right"].median_ms is None and found["right"].error is not None


@pytest.mark.parametrize("op", OPS)
def test_our_backends_and_plain_pytorch_pass_the_gate(op: str) -> None:
    case = Case(op, modes_of(op)[-1], "tiny", 128, "fp32")
    names = {p.name for p in providers.providers_of(op)} & {
        "torch",
        "cpp",
        "ours",
        "eager",
        "reference",
        "matmul",
        "torch-linear-ce",
    }
    found = run(*names, metrics=("error",), case=case)
    for name, row in found.items():
        assert row.status == results.OK or row.status.startswith("not usable here"), f"{name}: {row.status}"
        if row.status == results.OK and name != "matmul":
            assert row.error is not None and (row.grad_error is not None) == (case.mode != "forward")


def test_the_command_survives_providers_that_kill_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "run", "--with", str(FAKES), "--op", "divergence", "--shape", "tiny"]
    command += ["--tokens", "64", "--device", "cpu", "--samples", "3", "--out", str(tmp_path)]
    command += ["--provider", "dies", "dies-later", "hungry", "right", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = {row.provider: row for row in results.read(tmp_path)}
    assert found["dies"].status == "died of SIGSEGV"
    assert found["dies-later"].status == "killed by the system, most likely out of memory"
    assert found["right"].status == results.OK and found["right"].median_ms
    assert 199 <= (found["hungry"].peak_mb or 0) <= 230, "200 MB, less what the allocator had left"
    assert (found["right"].peak_mb or 0) <= 10
