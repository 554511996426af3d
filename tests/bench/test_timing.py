"""Interleaving, repetition, rotation and percentiles, on a stopwatch that is under control."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import providers, timing
from bench.cases import Case
from bench.inputs import make

from .clock import Clock


def test_a_run_too_short_for_the_timer_is_repeated() -> None:
    assert timing.repeats_for(1e-4, "cpu") == 51
    assert timing.repeats_for(1e-2, "cpu") == 1
    assert timing.repeats_for(1e-4, "cuda") == 6
    assert timing.repeats_for(0.0, "cpu") == 10_000


def test_slow_runs_get_fewer_samples_but_at_least_three_unless_very_slow() -> None:
    assert timing.samples_for(0.01, 5) == 5
    assert timing.samples_for(2.0, 5) == 3
    assert timing.samples_for(timing.SLOW + 1, 5) == 1
    assert timing.samples_for(0.01, 2) == 2


def test_variants_are_interleaved_and_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def variant(name: str) -> timing.Prepare:
        def prepare(k: int) -> Callable[[], object]:
            return lambda: seen.append((name, k))

        return prepare

    monkeypatch.setattr(timing, "SHORTEST", {"cpu": 0.0})  # no repetition
    monkeypatch.setattr(timing, "WARMED", 0.0)
    times, failed = timing.time_interleaved({"a": variant("a"), "b": variant("b")}, "cpu", samples=3)
    assert [name for name, _ in seen] == ["a", "b"] * 3
    assert len({k % 2 for name, k in seen if name == "a"}) == 2, "both copies of the inputs are used"
    assert not failed and times["a"].samples == 3


def test_each_sample_of_a_cpu_follows_an_untimed_run_of_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)

    def variant(name: str) -> timing.Prepare:
        def run() -> None:
            seen.append(name)
            if name == "a" and seen[-2:-1] != ["a"]:  # as where its memory has to be fetched
                clock.sleep(0.05)

        return lambda k: run

    monkeypatch.setattr(timing, "SHORTEST", {"cpu": 0.0})
    times, _ = timing.time_interleaved({"a": variant("a"), "b": variant("b")}, "cpu", samples=3)
    assert seen == ["a", "b"] + ["a", "a", "b", "b"] * 3
    assert times["a"].median == 0 and times["a"].samples == 3


def test_percentiles() -> None:
    t = timing.summary([0.005, 0.001, 0.003, 0.002, 0.004], repeats=7)
    assert (t.median, t.p20, t.p80) == pytest.approx((3.0, 1.8, 4.2)) and t.samples == 5 and t.repeats == 7
    alone = timing.summary([0.002], repeats=1)
    assert (alone.median, alone.p20, alone.p80) == pytest.approx((2.0, 2.0, 2.0))


def test_mode_backward_times_the_backward_pass_alone() -> None:
    providers.load()
    events: list[str] = []
    p = next(p for p in providers.providers_of("logprob") if p.name == "eager")
    inner = p.run

    def watched(i: object, mode: str) -> providers.Outputs:
        events.append("forward")
        return inner(i, mode)  # type: ignore[arg-type]

    i = make(Case("logprob", "backward", "tiny", 64, "fp32"))
    watch = providers.Provider("logprob", "x", watched, p.refuses, "torch")
    timed = providers.prepare_run(watch, [i, i], "backward")(0)
    assert events == ["forward"]
    grads = timed()
    assert events == ["forward"] and isinstance(grads, dict) and set(grads) == {"d_hidden", "d_weight"}
