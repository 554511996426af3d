"""The tuning run: every candidate is in force while it is timed, and the table is afterwards what it was."""

from __future__ import annotations

import pytest

from bench import timing, tuning
from bench.__main__ import main
from sgcd_kernels.backends.triton.configs import HALF, Config
from sgcd_kernels.backends.triton.launch import config_for

from .clock import Clock


def test_each_candidate_is_in_force_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    table, seen, compiled = dict(HALF["pair_stats"]), [], set()

    def call() -> None:
        config = config_for("pair_stats", 9, 2)
        seen.append(config)
        if config == table[9][1]:
            raise RuntimeError("out of resources")
        if config == table[9][2] and config not in compiled:
            compiled.add(config)
            clock.sleep(0.3)  # what a first call takes is no sample
        clock.sleep(0.02 if config == table[9][0] else 0.006)

    found = tuning.compare("pair_stats", 9, call, "cpu")
    first, second, third, *others = table[9]
    assert set(seen) == set(table[9]) == set(found)
    assert found[second] == "RuntimeError: out of resources"
    assert (found[first], found[third]) == pytest.approx((20.0, 6.0))
    assert all(isinstance(found[other], float) for other in others)
    assert HALF["pair_stats"] == table


def test_without_a_gpu_the_candidates_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune"]) == 0
    out = capsys.readouterr().out
    listed = [config for table in HALF.values() for candidates in table.values() for config in candidates]
    assert all(isinstance(config, Config) and str(config) in out for config in listed) and "nothing is timed" in out
