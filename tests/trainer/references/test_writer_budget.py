"""Retries, deadlines, concurrency and the token budget of the writer that asks an endpoint."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties import examples
from tests.trainer.references.endpoint_writers import MIXED, QUICK, ask, configured, run
from tests.trainer.siblings import ToySuite, group, task
from tests.trainer.stub_endpoint import Reply, StubEndpoint, completion, good_reply
from trainer.config import WriterConfig
from trainer.references import retries as retries_module
from trainer.references import writer_prompt as prompts
from trainer.references import writers
from trainer.references.retries import Budget, pause_after


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that are made, in seconds."""
    sleep, made = asyncio.sleep, list[float]()

    async def watched(delay: float, result: Any = None) -> Any:
        if delay:
            made.append(delay)
        return await sleep(delay, result)

    monkeypatch.setattr(asyncio, "sleep", watched)
    return made


def test_retries_honour_retry_after(tmp_path: Path, pauses: list[float]) -> None:
    made = group(*MIXED)
    with StubEndpoint(
        Reply(b"{}", 429, headers={"Retry-After": "1"}), Reply(b"", 500, headers=QUICK), Reply(good_reply())
    ) as stub:
        ask(stub, tmp_path, made)
        waits = [later - earlier for earlier, later in zip(stub.times, stub.times[1:])]
    assert made.reference
    assert pauses == [1.0, 0.005]
    assert waits[0] > 0.95


DRIPPED = b" " * 50_000  # at twenty bytes a second: reading it all takes most of an hour


def test_an_endpoint_that_drips_is_cut_off(tmp_path: Path) -> None:
    made = group(*MIXED)
    with StubEndpoint(Reply(DRIPPED, drip=0.05)) as stub:
        ask(stub, tmp_path, made, timeout=0.3, max_retries=0)
    assert made.reference_info["error"] == "timeout"


def test_an_error_is_not_read_on(tmp_path: Path) -> None:
    """However long it is, and however slowly it comes."""
    made = group(*MIXED)
    with StubEndpoint(Reply(DRIPPED, 500, drip=0.05)) as stub:
        ask(stub, tmp_path, made, max_retries=0)
    assert made.reference_info["error"] == "http_500"


def test_concurrency_is_bounded(tmp_path: Path) -> None:
    groups = [group(*MIXED, of=task(f"s{i}", f"task {i}")) for i in range(9)]
    with StubEndpoint(Reply(good_reply(), delay=0.05)) as stub:
        ask(stub, tmp_path, *groups, concurrency=3)
        assert stub.peak <= 3
        assert len(stub.bodies) == 9
    assert all(g.reference for g in groups)


def test_the_token_budget_holds(tmp_path: Path) -> None:
    groups = [group(*MIXED, of=task(f"s{i}", f"task {i}")) for i in range(8)]
    with StubEndpoint(Reply(good_reply(), delay=0.02)) as stub:
        writer = ask(stub, tmp_path, *groups, token_budget=2_500, max_tokens=100)
        calls = len(stub.bodies)
    assert writer.budget.spent <= 2_500
    assert 0 < calls < 8
    assert sum(g.reference_info.get("error") == "budget_spent" for g in groups) == 8 - calls


FATES = {
    "ok": Reply(good_reply()),
    "costly": Reply(completion(json.dumps({"steps": ["look"]}), tokens=1_500)),
    "lies": Reply(completion(json.dumps({"steps": ["look"]}), tokens=10**9)),
    "late": Reply(good_reply(), delay=0.15),
    "drop": Reply(drop=True),
    "busy": Reply(b"{}", 429, headers=QUICK),
    "broken": Reply(b"{}", 500, headers=QUICK),
    "cut": Reply(good_reply(), cut=30),
    "html": Reply(b"<html>"),
}


@given(
    st.lists(st.sampled_from(list(FATES)), min_size=1, max_size=12),
    st.integers(1, 20_000),
    st.integers(0, 3),
    st.integers(1, 4),
)
@settings(max_examples=examples(25))  # they wait for time-outs: 100 times as many take half an hour
def test_the_token_budget_holds_whatever_becomes_of_a_try(
    fates: list[str], limit: int, retries: int, concurrency: int
) -> None:
    """Spent plus reserved never exceeds it, and what the endpoint may have charged never exceeds what was spent."""
    seen_states: list[tuple[int, int]] = []

    class Watched(Budget):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if hasattr(self, "reserved"):
                seen_states.append((self.spent, self.reserved))

    groups = [group(*MIXED, of=task(f"s{i}", f"task {i}")) for i in range(5)]
    with tempfile.TemporaryDirectory() as folder, StubEndpoint(*(FATES[fate] for fate in fates)) as stub:
        fields = {"token_budget": limit, "max_tokens": 100, "timeout": 0.1, "max_retries": retries}
        config = configured(stub, Path(folder), concurrency=concurrency, **fields)
        writer: Any = writers.load(config, ToySuite())
        writer.budget = Watched(limit)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(retries_module, "LONGEST_PAUSE", 0.01)
            run(writer, *groups)
        happened = [fates[min(i, len(fates) - 1)] for i in range(len(stub.bodies))]
    assert all(spent + reserved <= limit for spent, reserved in seen_states)
    assert writer.budget.reserved == 0
    charged = {
        "ok": 100,
        "costly": 1_500,
        "lies": 100,
        "late": 100,
        "drop": 100,
        "cut": 100,
        "html": 100,
        "broken": 100,
        "busy": 0,  # a 429 is refused before the model is asked
    }
    assert writer.budget.spent >= sum(charged[fate] for fate in happened)
    assert all(g.reference or g.reference_info["error"] for g in groups)


def test_a_try_that_timed_out_is_counted_though_the_next_succeeds(tmp_path: Path) -> None:
    made = group(*MIXED)
    with StubEndpoint(Reply(good_reply(), delay=3600.0), Reply(good_reply())) as stub:
        writer = ask(stub, tmp_path, made, timeout=3.0)
        sizes = [len("".join(m["content"] for m in json.loads(body)["messages"])) for body in stub.bodies]
    assert made.reference
    assert len(sizes) == 2
    assert writer.budget.spent > sizes[0] + 100
    assert made.reference_info["tokens"] == writer.budget.spent - sizes[1] // 8 + 100


def test_no_deadline_runs_while_prompts_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made one after the other, and of long groups that takes seconds each: here by a clock put forward."""
    build, monotonic, ahead = prompts.build_prompt, time.monotonic, 0.0

    def slow(*arguments: Any) -> Any:
        nonlocal ahead
        ahead += 100.0
        return build(*arguments)

    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + ahead)
    monkeypatch.setattr(prompts, "build_prompt", slow)
    groups = [group(*MIXED, of=task(f"s{i}", f"task {i}")) for i in range(5)]
    with StubEndpoint(Reply(good_reply())) as stub:
        ask(stub, tmp_path, *groups, max_retries=0)
    assert all(g.reference for g in groups)


@pytest.mark.parametrize(
    ("error", "pause"),
    [
        ((429, {"Retry-After": "3"}), 3.0),
        ((429, {"Retry-After": "3", "retry-after-ms": "20"}), 0.02),
        ((503, {"Retry-After": "-1"}), 0.0),
        ((503, {"Retry-After": "86400"}), None),
        ((503, {"Retry-After": "9" * 500}), None),
        *(((503, {"Retry-After": odd}), 2.0) for odd in ("nan", "-nan", "inf", "-inf", "Infinity", "1e3", "1_0", "")),
        ((503, {"retry-after-ms": "nan", "Retry-After": "3"}), 3.0),
        ((503, {"Retry-After": "Fri, 99 Jan 9999999 00:00:00 GMT"}), 2.0),
        ((429, {"Retry-After": "0.5"}), 0.5),
        ((429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2.5s"}), 62.5),
        ((429, {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}), 0.02),
        ((429, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "7"}), 7.0),
        ((429, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1000000001"}), 0.0),
        ((429, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "99999999999999"}), None),
        ((429, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "nan"}), 2.0),
        ((429, {"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "1h"}), 2.0),
        ((429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1h"}), None),
        ((429, {"Retry-After": "1", "x-ratelimit-remaining": "0", "x-ratelimit-reset": "90"}), 1.0),
        ((429, {"Retry-After": "Fri, 01 Jan 2016 00:00:00 GMT"}), 0.0),
        ((429, {"Retry-After": "soon"}), 2.0),
        ((408, {}), 2.0),
        ((409, {}), 2.0),
        ((500, {}), 2.0),
        ((400, {}), None),
        ((401, {"Retry-After": "1"}), None),
        ((404, {}), None),
    ],
)
def test_pauses_between_tries(error: tuple[int, dict[str, str]], pause: float | None) -> None:
    response = httpx.Response(error[0], headers=error[1], request=httpx.Request("POST", "http://x"))
    raised: Any = openai.APIStatusError("", response=response, body=None)  # type: ignore[arg-type]
    given_pause = pause_after(raised, 3)
    assert given_pause == pause or (pause == 2.0 and given_pause is not None and 1.5 <= given_pause <= 2.0)
    lost: Any = openai.APITimeoutError(request=response.request)  # type: ignore[arg-type]
    assert all(0 < (pause_after(lost, tries) or 0) <= 8 for tries in range(1, 50))
    assert pause_after(ValueError(), 1) is None


def test_an_endpoint_that_asks_for_more_patience_than_there_is_left(tmp_path: Path, pauses: list[float]) -> None:
    made = group(*MIXED)
    with StubEndpoint(Reply(b"{}", 503, headers={"Retry-After": "100"})) as stub:
        ask(stub, tmp_path, made, max_retries=1)
        assert len(stub.bodies) == 1
    assert pauses == []
    assert made.reference_info["error"] == "http_503"


def test_the_token_budget_is_of_the_whole_run(tmp_path: Path) -> None:
    with StubEndpoint(Reply(good_reply())) as stub:
        first = ask(stub, tmp_path, group(*MIXED), token_budget=2_500, max_tokens=100)
        state = json.loads(json.dumps(first.state_dict()))
        calls = len(stub.bodies)
        resumed = writers.load(configured(stub, tmp_path, token_budget=first.budget.spent, max_tokens=100), ToySuite())
        resumed.load_state_dict(state)
        late = group(*MIXED, of=task("s9", "task 9"))
        run(resumed, late)
    assert (late.reference_info["error"], len(stub.bodies)) == ("budget_spent", calls)
    offline = writers.load(WriterConfig(name="contrast"), ToySuite())
    assert offline.state_dict() == {}
    offline.load_state_dict({})


def test_usage_that_lies_cannot_break_the_budget(tmp_path: Path) -> None:
    for tokens in (-5, 10**15):
        made = group(*MIXED)
        with StubEndpoint(Reply(completion(json.dumps({"steps": ["look"]}), tokens=tokens))) as stub:
            writer = ask(stub, tmp_path / str(tokens), made)
        assert 0 < writer.budget.spent < 10_000


def test_what_may_have_been_charged_is_counted(tmp_path: Path) -> None:
    """A connection that drops after the request, once for each try; an endpoint that is not there; one that lies."""
    estimates = {}
    for name, reply in (("drop", Reply(drop=True)), ("late", Reply(good_reply(), delay=3600.0))):
        with StubEndpoint(reply) as stub:
            writer = ask(stub, tmp_path / name, group(*MIXED), max_retries=1, timeout=2.0)
            estimates[name] = writer.budget.spent
            assert writer.budget.spent >= len(stub.bodies) * len(stub.bodies[0]) // 8
    assert estimates["drop"] == estimates["late"] > 0
    with StubEndpoint() as stub:
        gone = configured(stub, tmp_path / "gone", max_retries=0)
    absent = writers.load(gone, ToySuite())
    run(absent, group(*MIXED))
    assert absent.budget.spent == 0  # type: ignore[attr-defined]
    with StubEndpoint(Reply(completion(json.dumps({"steps": ["look"]}), tokens=11))) as stub:
        lied = ask(stub, tmp_path / "lied", group(*MIXED))
        assert lied.budget.spent >= len(stub.bodies[0]) // 12 > 11
