"""The metrics say what a reader takes them to say: checked against counting by hand, and against their bounds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trainer import metrics
from trainer.metrics import Scored
from trainer.reporting import MetricLogger
from trainer.types import Group, Rollout, Task, TokenClass


def task(name: str = "t", kind: Any = "state_changing") -> Task:
    return Task(name, "toy", "dev", name, kind, "do it")


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "send", "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def rollout(reward: float, messages: Any = (), *, generated: int = 4, observed: int = 2, **fields: Any) -> Rollout:
    """A rollout whose generated tokens are all in turn 0, then as many observed ones."""
    n = generated + observed
    return Rollout(
        fields.pop("task", task()),
        fields.pop("prompt_messages", []),
        [],
        [1, 2],
        ids=list(range(n)),
        generated=[True] * generated + [False] * observed,
        logprobs=[0.0] * n,
        turns=[0] * n,
        classes=fields.pop("classes", [int(TokenClass.ANSWER)] * n),
        messages=list(messages),
        reward=reward,
        stop=fields.pop("stop", "answer"),
    )


def scored(
    r: Rollout, weights: list[float], divergence: list[float] | None = None, span: list[int] | None = None
) -> Scored:
    """The given values at the generated tokens, and poison at the observed ones: they must never be read."""
    rest = len(r.ids) - len(weights)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values + [float("nan")] * rest)

    zero = [0.0] * len(weights)
    return Scored(
        r,
        student_logp=column(zero),
        teacher_logp=column(zero),
        divergence=column(divergence or zero),
        student_entropy=column(zero),
        teacher_entropy=column(zero),
        weights=column(weights),
        saliency=column([w - 1 for w in weights]),
        span_ids=torch.tensor((span or [-1] * len(weights)) + [99] * rest),
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_gini_is_bounded_and_blind_to_scale_and_order(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    g = metrics.gini(x)
    assert 0 <= g <= 1
    assert metrics.gini(3 * x.flip(0)) == pytest.approx(g, abs=1e-9)


def test_gini_of_known_distributions() -> None:
    assert metrics.gini(torch.ones(10)) == pytest.approx(0)
    assert metrics.gini(torch.tensor([0.0] * 9 + [5.0])) == pytest.approx(0.9)
    assert metrics.gini(torch.zeros(4)) == 0


@given(st.lists(st.floats(0, 3), min_size=1, max_size=60))
def test_the_histogram_of_w_is_a_distribution(values: list[float]) -> None:
    bins = metrics.w_histogram(torch.tensor(values))
    assert sum(bins.values()) == pytest.approx(1)
    ones = sum(abs(v - 1) < 5e-4 for v in values) / len(values)
    assert bins["credit/w_hist/0.999"] >= ones - 1e-9


def test_rollout_metrics_count_what_was_sampled() -> None:
    won = rollout(1.0, [call(to="amy"), said("done")], generated=6)
    idle = rollout(1.0, [said("no")], generated=2, task=task("u", "no_action"))
    lost = rollout(0.0, [call(to="bob"), call(to="eve")], generated=4, stop="max_turns")
    groups = [Group(task(), [won, lost]), Group(task("u", "no_action"), [idle, idle])]
    m = metrics.rollout_metrics(groups)
    assert m["reward"] == 0.75
    assert m["reward_std"] == 0.25  # the means of 0.5 and 0
    assert (m["by_group/frac_mixed"], m["by_group/frac_solved"], m["by_group/frac_failed"]) == (0.5, 0.5, 0)
    assert (m["stop/answer"], m["stop/max_turns"]) == (0.75, 0.25)
    assert m["completions/mean_length"] == 3.5  # generated tokens only
    assert m["completions/mean_length_solved"] == pytest.approx(10 / 3)
    assert m["completions/mean_length_failed"] == 4
    assert m["tools/per_rollout"] == 0.75
    assert m["tools/zero_share_of_solved"] == pytest.approx(2 / 3)
    assert (m["success/state_changing"], m["success/no_action"], m["success/class_balanced"]) == (0.5, 1.0, 0.75)


def test_credit_metrics_read_generated_tokens_only() -> None:
    classes = [int(c) for c in (TokenClass.CALL_NAME, TokenClass.ARGUMENT, TokenClass.ARGUMENT, TokenClass.ANSWER)]
    r = rollout(1.0, classes=[*classes, 0, 0])
    m = metrics.credit_metrics([scored(r, [2.0, 1.5, 1.0, 1.0], [0.8, 0.4, 0.0, 0.0], [0, 0, -1, -1])])
    assert not any(math.isnan(v) for v in m.values()), "an observed token was read"
    assert m["credit/w_mean"] == pytest.approx(1.375)
    assert m["credit/frac_salient"] == 0.5
    assert m["credit/frac_capped"] == 0.25
    assert (m["credit/spans"], m["credit/span_length"]) == (1, 2)
    assert m["credit/d/call_name"] == pytest.approx(0.8)
    assert m["credit/d/argument"] == pytest.approx(0.2)
    assert m["credit/mass/call_name"] == pytest.approx(2 / 3)
    assert "credit/d/format" not in m, "the observed tokens' class has no generated token"
    assert m["credit/mass_turn/0"] == pytest.approx(1)
    assert sum(m[f"credit/mass_decile/{i}"] for i in range(10)) == pytest.approx(1)
    assert m["credit/mass_decile/0"] == pytest.approx(2 / 3)


def test_credit_that_does_nothing_is_called_inert() -> None:
    m = metrics.credit_metrics([scored(rollout(1.0), [1.0] * 4)])
    assert (m["credit/inert"], m["credit/w_mean"], m["credit/gini"]) == (1.0, 1.0, 0.0)
    assert metrics.credit_metrics([]) == {}


def test_a_phrase_of_the_reference_counts_only_when_nothing_else_showed_it() -> None:
    reference = "always check the calendar first before you book"
    leaked = rollout(1.0, [said("I always check the calendar first")])
    told = rollout(1.0, [said("I always check the calendar first")])
    told.prompt_messages = [{"role": "system", "content": "Please always check the calendar first ."}]
    own = rollout(0.0, [said("booked it")])
    group = Group(task(), [leaked, told, own], reference=reference)
    assert metrics.leaked_phrases(group) == pytest.approx(1 / 3)


def test_reference_metrics_count_failures_and_overlap() -> None:
    good = Group(task(), [rollout(1.0, [call(to="amy", day="monday")])], reference="write to amy")
    good.reference_info = {"tokens": 30, "seconds": 0.5, "sanitiser_hits": {"email": 2, "amount": 1}}
    failed = Group(task(), [rollout(0.0)], reference_info={"error": "timeout"})
    m = metrics.reference_metrics([good, failed])
    assert m["reference/supplied"] == 0.5
    assert (m["reference/errors"], m["reference/error/timeout"]) == (1, 1)
    assert m["reference/sanitiser_hits"] == 3
    assert m["leak/argument_overlap"] == 0.5


def test_only_what_nothing_else_showed_counts_as_taken_from_the_reference() -> None:
    root = rollout(1.0, [call(path="."), call(path="...")])
    told = rollout(1.0, [call(to="Amy")], prompt_messages=[{"role": "user", "content": "Write to amy, please"}])
    found = rollout(1.0, [{"role": "tool", "content": '{"to":"amy"}'}, call(to="amy")])
    taken = rollout(0.0, [call(to="Amy")])
    reference = "steps send answer . avoid amy ."
    for one, share in ((root, 0.0), (told, 0.0), (found, 0.0), (taken, 1.0)):
        assert metrics.argument_overlap(Group(task(), [one], reference=reference)) == share


def test_the_record_holds_one_object_a_step(tmp_path: Path) -> None:
    console = Console(file=(tmp_path / "screen.txt").open("w"), width=200)
    with MetricLogger(tmp_path, total_steps=2, console=console) as logger:
        logger.log(1, {"reward": 0.5, "credit/w_mean": 1.25})
        with logger.track("evaluate", 3) as advance:
            advance(3)
        logger.log(2, {"reward": float("nan"), "eval/toy/tgc": 0.75})
        with pytest.raises(AssertionError):
            logger.log(2, {})
        logger.say("[not markup]")
    console.file.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "reward": 0.5, "credit/w_mean": 1.25},
        {"step": 2, "reward": None, "eval/toy/tgc": 0.75},
    ]
    screen = (tmp_path / "screen.txt").read_text().splitlines()
    assert len(screen) == 3
    assert "step 1/2" in screen[0] and "reward 0.5" in screen[0] and "W 1.25" in screen[0]
    assert "toy/tgc 0.75" in screen[1]
    assert screen[2] == "[not markup]"


def test_tensorboard_receives_every_scalar(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricLogger(tmp_path, total_steps=1, report_to=["tensorboard"], console=Console(quiet=True)) as logger:
        logger.log(1, {"reward": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5)]
