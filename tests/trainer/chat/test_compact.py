"""The tiny policy's language and its demonstrations."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.warmstart.demonstrations import Recipe, attempt, demonstrations, drills, reference_of
from scripts.warmstart.vocabulary import tokenizer, vocabulary
from trainer.chat.compact import SPECIAL, CompactRenderer
from trainer.data import TokenClass
from trainer.envs.workday import tasks as catalogue
from trainer.envs.workday.world import PEOPLE, SPECS
from trainer.errors import UserError
from trainer.references.contrast import EMPTY_SHELL

RENDERER = CompactRenderer(tokenizer())
TOKENS = st.lists(st.integers(0, len(vocabulary()) - 1), max_size=30)


def spell(text: str) -> list[int]:
    return RENDERER.encode(text.split())


@given(
    st.sampled_from(list(SPECS)),
    st.dictionaries(st.sampled_from(["to", "sender", "day"]), st.one_of(st.sampled_from(PEOPLE), st.integers(0, 99))),
)
def test_a_call_survives_the_way_to_tokens_and_back(name: str, arguments: dict[str, object]) -> None:
    function = {"name": name, "arguments": json.dumps(arguments)}
    message = {
        "role": "assistant",
        "content": "ok",
        "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
    }
    assert RENDERER.parse([*RENDERER.encode(RENDERER.turn(message)), RENDERER.end]) == (message, "")


@given(TOKENS)
def test_parsing_and_classes_never_fail(ids: list[int]) -> None:
    message, problem = RENDERER.parse(ids)
    assert message["role"] == "assistant"
    assert not (problem and "tool_calls" in message)
    for made in message.get("tool_calls", []):
        json.loads(made["function"]["arguments"])
    assert len(RENDERER.classes(ids)) == len(RENDERER.pieces(ids)) == len(ids)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<call> <end>", "call without a tool name"),
        ("<call> mail_find sender <end>", "mail_find needs pairs of argument and value"),
        ("<call> mail_find sender <user> <end>", "<user> inside a call"),
    ],
)
def test_a_malformed_call_is_named(text: str, problem: str) -> None:
    assert RENDERER.parse(spell(text))[1] == problem


def test_only_usual_spellings_are_numbers() -> None:
    """`int` takes digits of any script and leading zeros, and raises at a superscript that `isdigit` takes."""
    odd = [*SPECIAL, "f", "a", "12", "0", "007", "²", "٣"]
    made = CompactRenderer(SimpleNamespace(get_vocab=lambda: {word: i for i, word in enumerate(odd)}))
    for word, value in (("12", 12), ("0", 0), ("007", "007"), ("²", "²"), ("٣", "٣")):
        message, problem = made.parse(made.encode(["<call>", "f", "a", word, "<end>"]))
        assert (json.loads(message["tool_calls"][0]["function"]["arguments"]), problem) == ({"a": value}, "")


def test_classes_tell_reasoning_call_argument_and_answer() -> None:
    F, R, N, A, W = (
        TokenClass.FORMAT,
        TokenClass.REASONING,
        TokenClass.CALL_NAME,
        TokenClass.ARGUMENT,
        TokenClass.ANSWER,
    )
    assert RENDERER.classes(spell("ok <call> mail_find sender ada <end>")) == [R, F, N, A, A, F]
    assert RENDERER.classes(spell("done <end>")) == [W, F]


def test_an_empty_reference_changes_nothing_and_a_reference_only_comes_before() -> None:
    messages = [{"role": "user", "content": "pay the invoice of ada"}]
    plain = RENDERER.prompt(messages, [])
    assert RENDERER.prompt(messages, [], "") == plain
    told = RENDERER.prompt(messages, [], "steps mail_find answer .")
    assert told[-len(plain) :] == plain
    assert RENDERER.decode(told).startswith("<ref> steps mail_find answer . <end> <user>")


def test_observations_flatten_json() -> None:
    ids = RENDERER.observation([{"role": "tool", "content": json.dumps({"away": "yes", "deputy": "ada"})}])
    assert RENDERER.decode(ids) == "<tool> away yes deputy ada <end> <assistant> "


def test_every_word_the_world_can_say_is_known() -> None:
    for shown in demonstrations(600, RENDERER, Recipe(), 5):
        assert RENDERER.unknown not in shown.ids
    for split in catalogue.SPLITS:
        for task in catalogue.tasks(split):
            assert RENDERER.unknown not in spell(task.instruction)
    assert RENDERER.unknown not in spell(EMPTY_SHELL)


def test_a_tokenizer_without_the_markers_is_refused() -> None:
    with pytest.raises(UserError, match="compact needs the tokens <user>"):
        CompactRenderer(SimpleNamespace(get_vocab=lambda: {"<pad>": 0, "<unk>": 1}))


def test_demonstrations_have_loss_on_the_assistants_tokens_only() -> None:
    for shown in demonstrations(200, RENDERER, Recipe(), 6):
        words = RENDERER.pieces(shown.ids)
        for previous, word, mine in zip(["", *words], words, [*shown.loss_mask]):
            assert not (mine and word in ("<tool> ", "<assistant> ", "<user> ", "<ref> "))
            if previous == "<assistant> ":
                assert mine
        assert shown.loss_mask[-1]


def test_a_reference_is_followed_by_its_demonstration() -> None:
    rng = random.Random(0)
    found = 0
    for task in catalogue.tasks("dev"):
        written = reference_of([attempt(task, rng, Recipe()) for _ in range(16)])
        if written:
            found += 1
            reference, done = written
            assert done.passed
            assert reference.startswith("steps " + " ".join(done.path) + " .")
            assert not set(reference.split()) & set(PEOPLE)
    assert found > 20


def test_fillers_are_alike_with_and_without_reference() -> None:
    shown = demonstrations(1_000, RENDERER, Recipe(), 7)
    ref = RENDERER.vocabulary["<ref>"]
    shares = []
    for told in (True, False):
        some = [e for e in shown if (e.ids[0] == ref) == told]
        opened = calls = 0
        for e in some:
            for previous, token, mine in zip(e.ids, e.ids[1:], e.loss_mask[1:]):
                calls += mine and token == RENDERER.vocabulary["<call>"]
                opened += (
                    mine and token == RENDERER.vocabulary["<call>"] and previous != RENDERER.vocabulary["<assistant>"]
                )
        shares.append(opened / calls)
    assert abs(shares[0] - shares[1]) < 0.05


def test_drills_say_everything_twice() -> None:
    for drill in drills(20, RENDERER, 0):
        half = len(drill.ids) // 2
        assert drill.ids[:half] == drill.ids[half:]
        assert sum(drill.loss_mask) == half - 1
