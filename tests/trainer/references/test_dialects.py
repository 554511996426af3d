"""The forms in which OpenAI-compatible servers answer, and the parameters that they do not know."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties import examples
from tests.trainer.references.endpoint_writers import KEY, MIXED, ask, configured, run
from tests.trainer.siblings import ToySuite, group, task
from tests.trainer.stub_endpoint import GOOD, Reply, StubEndpoint, good_reply
from trainer.errors import UserError
from trainer.references import writers
from trainer.references.bounded_reading import TooLong, unpack
from trainer.references.completion_body import Completion, ErrorInBody, NotACompletion, read_completion
from trainer.references.writer_prompt import Refused, parse_reply

ANSWER = json.dumps(GOOD)
ANALYSIS = "<|channel|>analysis<|message|>"
DRAFT = json.dumps({**GOOD, "steps": ["draft"]})


def whole(message: dict[str, Any], finish: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return json.dumps({"choices": [choice]}).encode()


def pieces(text: str, **other: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that spells `text`."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": text[i : i + 7]} for i in range(0, len(text), 7))]
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    return [*chunks, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": [], **other}]


def events(chunks: list[dict[str, Any]], line: str = "\n", ends: str = "\n\n", done: bool = True) -> bytes:
    shown = [f"data: {json.dumps(chunk)}".replace("\n", line) for chunk in chunks]
    return ends.join([": keep-alive", *shown, *(["data: [DONE]"] if done else []), ""]).encode()


TEXTS = {
    "alone": ANSWER,
    "thought": f"<think>{{maybe}} {DRAFT}</think>{ANSWER}",
    "thought opened by the template": f"well, {{maybe}} {DRAFT}\n</think>\n\n{ANSWER}",
    "thought in capitals": f"<THINKING>\n{DRAFT}\n</THINKING>{ANSWER}",
    "thought with a prefix": f"<seed:think>{DRAFT}</seed:think>{ANSWER}",
    "thought in brackets": f"[THINK]{DRAFT}[/THINK]{ANSWER}",
    "thought in triangles": f"\u25c1think\u25b7{DRAFT}\u25c1/think\u25b7{ANSWER}",
    "channels": f"{ANALYSIS}{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}<|return|>",
    "channel with a constraint": f"{ANALYSIS}hm<|end|><|channel|>final <|constrain|>json<|message|>{ANSWER}",
    "two thoughts": f"<think>a</think> b <think>{DRAFT}</think>{ANSWER}",
    "thought that does not end": f"<think>{DRAFT} no, rather {ANSWER}",
    "answer before the end of the thought": f"<think>so {ANSWER}</think>",
    "fence": f"```json\n{ANSWER}\n```",
    "fence in words": f"Here it is:\n```\n{ANSWER}\n```\nHope {{this}} helps!",
    "braces before": f"The set {{a, b}} and {{}} and {{\"tool\": 1}}: {ANSWER}",
    "trailing object": f"{ANSWER}\n{{\"note\": \"done\"}} }}",
    "goes on": f"{ANSWER}<|im_end|>\n<|im_start|>user\n{DRAFT}",
    "inside another": json.dumps({"reference": GOOD, "confidence": 0.9}),
    "in a list": f"[{ANSWER}]",
    "line breaks inside strings": ANSWER.replace("the day has", "the\nday\thas"),
    "more fields": json.dumps({**GOOD, "thoughts": "x", "n": float("nan")}),
    "a brace in a string": ANSWER.replace('"masked": []', '"masked": ["}{ </think>"]'),
    "mark of order": f"\ufeff{ANSWER}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_the_answer_is_found_in_a_text(name: str) -> None:
    reply = parse_reply(TEXTS[name])
    assert reply.steps == GOOD["steps"]
    assert reply.checks[0].tool == "look"


@pytest.mark.parametrize(
    "text", ["{" * 60_000, '{"a":' * 12_000, "[{" * 30_000, '{"steps": ["a"', "<think>", "</think>", "{}"]
)
def test_a_text_without_an_answer_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="invalid_json"):
        parse_reply(text)


PARTS = [{"type": "text", "text": ANSWER[:20]}, {"type": "text", "text": ANSWER[20:]}]
BODIES: dict[str, bytes] = {
    "string": whole({"content": ANSWER}),
    "parts": whole({"content": PARTS}),
    "parts with a thought": whole({"content": [{"type": "thinking", "thinking": DRAFT}, *PARTS]}),
    "plain parts": whole({"content": [ANSWER[:9], ANSWER[9:]]}),
    "nested text": whole({"content": [{"type": "text", "text": {"value": ANSWER, "annotations": []}}]}),
    "object": whole({"content": GOOD}),
    "thought beside it": whole({"content": ANSWER, "reasoning_content": DRAFT, "reasoning": DRAFT}),
    "reasoning_content only": whole({"content": None, "reasoning_content": f"hm {ANSWER}"}),
    "reasoning only": whole({"content": "", "reasoning": ANSWER}),
    "thinking only": whole({"content": "\n", "thinking": ANSWER}),
    "cut after its end": whole({"content": f"{ANSWER} and so"}, "length"),
    "no role, no index, no finish": json.dumps({"choices": [{"message": {"content": ANSWER}}]}).encode(),
    "null error": json.dumps({"error": None, **json.loads(whole({"content": ANSWER}))}).encode(),
    "completions": json.dumps({"choices": [{"text": ANSWER, "index": 0, "finish_reason": "stop"}]}).encode(),
    "several choices": json.dumps({"choices": [
        {"index": 1, "message": {"content": "no"}}, {"index": 0, "message": {"content": ANSWER}}]}).encode(),
    "list around it": b"[" + whole({"content": ANSWER}) + b"]",
    "byte-order mark": b"\xef\xbb\xbf" + whole({"content": ANSWER}),
    "UTF-16": whole({"content": ANSWER}).decode().encode("utf-16"),
    "spaces before": b"\n \n\n" + whole({"content": ANSWER}),
    "a bad byte": whole({"content": ANSWER}).replace(b"the day has room", b"the day \xff has room"),
    "events": events(pieces(ANSWER)),
    "events with usage": events(pieces(ANSWER, usage={"total_tokens": 100})),
    "events, CRLF": events(pieces(ANSWER), ends="\r\n\r\n"),
    "events, single line ends": events(pieces(ANSWER), ends="\n"),
    "events without a space": events(pieces(ANSWER)).replace(b"data: ", b"data:"),
    "events, none at the end": events(pieces(ANSWER), done=False),
    "events with names and pings": b"event: ping\ndata: ping\n\n"
    + events(pieces(ANSWER)).replace(b"data: {", b"id: 3\nevent: m\ndata: {"),
    "events with another line separator": events(pieces(ANSWER + "\u2028 x")),
    "events with a thought": events([
        {"choices": [{"delta": {"reasoning_content": DRAFT}}]}, *pieces(ANSWER)]),
    "one event, a whole message": b"data: " + whole({"content": ANSWER}) + b"\n\n",
    "lines": "\n".join(map(json.dumps, pieces(ANSWER))).encode(),
    "native lines": "\n".join(
        json.dumps({"message": {"role": "assistant", "content": ANSWER[i : i + 50]}, "done": False})
        for i in range(0, len(ANSWER), 50)).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_dialect_is_understood(name: str) -> None:
    reply = parse_reply(read_completion(BODIES[name]).text)
    assert reply.steps == GOOD["steps"]


def test_dialects_over_the_wire(tmp_path: Path) -> None:
    """Through the writer and the client: with odd types, compressed, and without a length."""
    kinds = ["application/json", "text/event-stream", "text/html; charset=latin-1", "application/x-ndjson", "nonsense"]
    bodies = list(BODIES.values())
    script = [Reply(body, headers={"Content-Type": kinds[i % len(kinds)]}) for i, body in enumerate(bodies)]
    script.append(Reply(zlib.compress(bodies[0]), headers={"Content-Encoding": "deflate"}))
    groups = [group(*MIXED, of=task(f"s{i}", f"task {i}")) for i in range(len(script))]
    with StubEndpoint(*script) as stub:
        ask(stub, tmp_path, *groups, concurrency=1, max_retries=0)
        assert json.loads(stub.bodies[0])["stream"] is False
    errors = {i: g.reference_info["error"] for i, g in enumerate(groups) if not g.reference}
    assert not errors


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (whole({"content": None, "refusal": "I can not do that"}), "refused"),
        (whole({"content": ANSWER[:-9]}, "length"), "truncated"),
        (whole({"content": "", "reasoning": "hm"}, "length"), "truncated"),
        (whole({"content": None}), "empty"),
        (b'{"choices": []}', "not_json"),
        (b'{"detail": "x"}', "not_json"),
        (b"<!doctype html><p>data: 3", "not_json"),
        (b'{"error": {"message": "no", "code": "oops"}}', "error_reply"),
        (b'{"error": "no"}', "error_reply"),
        (b'{"error": {"code": 404}}', "http_404"),
        (b'data: {"error": {"code": 400, "message": "no"}}\n\n', "http_400"),
        (b'{"choices": [{"error": {"code": 502}, "message": {"content": ""}}]}', "http_502"),
        (events(pieces(ANSWER[:50])), "invalid_json"),
    ],
)
def test_what_is_no_answer_has_a_word(body: bytes, reason: str, tmp_path: Path) -> None:
    made = group(*MIXED)
    with StubEndpoint(Reply(body)) as stub:
        ask(stub, tmp_path, made, max_retries=0)
    assert (made.reference, made.reference_info["error"]) == ("", reason)


def test_an_error_in_an_answer_is_retried_as_its_code_says(tmp_path: Path) -> None:
    made = group(*MIXED)
    with StubEndpoint(
        Reply(b'{"error": {"code": 429}}'), Reply(b'{"error": {"code": 503}}'), Reply(good_reply())
    ) as stub:
        ask(stub, tmp_path, made)
        assert len(stub.bodies) == 3
    assert made.reference


def strict(*unknown: str, status: int = 400, say: Callable[[str], str] = "Unrecognized argument: {}".format) -> Any:
    """A server that refuses a request with any of these parameters, and names the first of them."""

    def answer(body: dict[str, Any]) -> Reply:
        given = [name for name in unknown if name in body or (name == "system" and body["messages"][0]["role"] == name)]
        if given:
            return Reply(json.dumps({"error": {"message": say(given[0])}}).encode(), status)
        return Reply(good_reply())

    return answer


@pytest.mark.parametrize(
    ("endpoint", "asked"),
    [
        (strict("max_completion_tokens"), 2),
        (strict("max_completion_tokens", status=422, say='["body","{}"]: Extra inputs are not permitted'.format), 2),
        (strict("max_completion_tokens", say=lambda name: "'max_tokens' is required"), 2),
        (strict("stream"), 2),
        (strict("system", status=500, say=lambda name: "System role not supported"), 2),
        (strict("system", say=lambda name: "System role not supported"), 2),
        (strict("system", say=lambda name: "Conversation roles must alternate user/assistant/user/..."), 2),
        (strict("max_completion_tokens", "stream", "system", say="unknown: {} role".format), 4),
    ],
)
def test_a_parameter_that_a_server_does_not_know_is_given_up_for_the_run(
    endpoint: Any, asked: int, tmp_path: Path
) -> None:
    made = [group(*MIXED, of=task(f"s{i}", f"task {i}")) for i in range(3)]
    with StubEndpoint(endpoint) as stub:
        writer = writers.load(
            configured(stub, tmp_path, max_retries=0, concurrency=1, token_budget=500_000), ToySuite()
        )
        for one in made:
            run(writer, one)
        assert len(stub.bodies) == asked + 2
        last = json.loads(stub.bodies[-1])
    assert all(one.reference for one in made)
    assert {"max_tokens", "max_completion_tokens"} & last.keys(), "an answer always has a bound"
    assert "book the room" in str(last["messages"]) or "task" in str(last["messages"])
    assert writer.budget.spent < 5_000  # type: ignore[attr-defined]  # a refusal with 400 costs nothing


def test_an_error_in_an_answer_may_name_a_parameter(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        if "max_completion_tokens" in body:
            return Reply(b'{"error": {"code": 400, "message": "max_completion_tokens: unknown"}}')
        return Reply(good_reply())

    made = group(*MIXED)
    with StubEndpoint(answer) as stub:
        ask(stub, tmp_path, made, max_retries=0)
    assert made.reference


def test_a_server_that_refuses_everything_is_asked_a_few_times(tmp_path: Path) -> None:
    every = json.dumps({"error": "max_completion_tokens, max_tokens, stream, system role, model, messages"}).encode()
    made, late = group(*MIXED), group(*MIXED, of=task("s2", "task 2"))
    with StubEndpoint(Reply(every, 400)) as stub:
        writer = ask(stub, tmp_path, made)
        assert len(stub.bodies) == 2
        assert made.reference_info["error"] == "http_400"
        stub.script = [Reply(good_reply())]
        run(writer, late)
        assert "max_completion_tokens" in json.loads(stub.bodies[-1]), "what did not help is not remembered"
    assert late.reference


def test_a_complaint_is_read_for_a_short_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.references.bounded_reading.COMPLAINT_TIME", 0.2)
    made = group(*MIXED)
    with StubEndpoint(Reply(b"stream " * 10_000, 400, drip=0.05)) as stub:
        ask(stub, tmp_path, made)
        assert len(stub.bodies) == 1
    assert made.reference_info["error"] == "http_400"


def test_a_limit_that_a_server_ignores_is_sent_by_its_older_name(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        written = min(body.get("max_tokens", 900), 900)
        usage = {"prompt_tokens": 300, "completion_tokens": written, "total_tokens": 300 + written}
        return Reply(json.dumps({**json.loads(whole({"content": ANSWER})), "usage": usage}).encode())

    made = [group(*MIXED, of=task(f"s{i}", f"task {i}")) for i in range(2)]
    with StubEndpoint(answer) as stub:
        writer = writers.load(configured(stub, tmp_path, max_tokens=200), ToySuite())
        for one in made:
            run(writer, one)
        limits = [{k: v for k, v in json.loads(body).items() if "tokens" in k} for body in stub.bodies]
        assert limits == [{"max_completion_tokens": 200}, {"max_tokens": 200}]
        assert probe(stub, tmp_path) == "a chat request was answered (316 tokens)"


def probe(stub: StubEndpoint, tmp_path: Path, **fields: Any) -> str:
    return asyncio.run(writers.load(configured(stub, tmp_path, **fields), ToySuite()).probe())  # type: ignore[attr-defined]


def test_check_asks_for_a_token(tmp_path: Path) -> None:
    with StubEndpoint(strict("max_completion_tokens", "system", say="no {} role".format)) as stub:
        assert probe(stub, tmp_path) == "a chat request was answered (100 tokens)"
        last = json.loads(stub.bodies[-1])
        assert last["max_tokens"] <= 16
    with StubEndpoint(Reply(whole({"content": None, "reasoning": "hm"}, "length"))) as stub:
        assert "answered" in probe(stub, tmp_path)  # a model that thinks first


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(b'{"error": "no chat template \\u001b[31m for %s"}' % KEY.encode(), 400), "http_400.*no chat template"),
        (Reply(b"<html>", 200), "not_json"),
        (Reply(b"", 307, headers={"Location": "/v2"}), "http_307"),
        (Reply(b"{}", 500), "http_500"),
        (Reply(b"{}", 429), "rate_limited"),
        (Reply(drop=True), "connection"),
        (Reply(good_reply(), delay=3600), "timeout"),
        (Reply(b'{"error": {"code": 402, "message": "pay"}}'), "http_402"),
    ],
)  # fmt: skip
def test_check_says_in_one_line_what_failed(
    reply: Reply, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with caplog.at_level(logging.DEBUG), StubEndpoint(reply) as stub:
        with pytest.raises(UserError, match=words) as raised:
            probe(stub, tmp_path, timeout=1.0)
        assert len(stub.bodies) == 1
    (line,) = raised.value.lines
    assert line.isprintable() and KEY not in line and KEY not in caplog.text
    assert len(line) < 400


@given(
    st.binary(max_size=300) | st.text(max_size=300).map(str.encode) | st.sampled_from(list(BODIES.values())), st.data()
)
@settings(max_examples=examples(200))
def test_no_body_breaks_the_reader(body: bytes, data: st.DataObject) -> None:
    """Whatever comes, cut or with bytes changed: a completion, or one of the errors that it documents."""
    cut = data.draw(st.integers(0, len(body)))
    for given_body in (body, body[:cut], body[cut:] + body[:cut]):
        with contextlib.suppress(NotACompletion, ErrorInBody, TooLong):
            assert isinstance(read_completion(unpack(given_body, "")), Completion)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "choices message delta content text error usage finish_reason index refusal reasoning".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(VALUES)
@settings(max_examples=examples(200))
def test_no_value_breaks_the_reader(value: Any) -> None:
    with contextlib.suppress(NotACompletion, ErrorInBody):
        assert isinstance(read_completion(json.dumps(value).encode()), Completion)
