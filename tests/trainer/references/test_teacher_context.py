"""What the teacher reads, which tokens are shielded, and what leaks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.trainer.siblings import task
from trainer.chat.compact import SPECIAL, CompactRenderer
from trainer.data import Rollout
from trainer.references.teacher_context import literal_mask, teacher_prompt

WORDS = ["steps", "look", "act", "answer", "check", "avoid", ".", "it", "is", "14", "140", "at", "hour", "day", "mon"]
WORDS += ["ok", "dana", "'dana'"]


class Vocabulary:
    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate([*SPECIAL, *WORDS])}


class Characters:
    """A renderer whose every token is some characters, as a byte-pair tokenizer cuts them."""

    def __init__(self, pieces: list[str]) -> None:
        self.table = pieces

    def pieces(self, ids: list[int]) -> list[str]:
        return [self.table[i] for i in ids]


@pytest.fixture
def renderer() -> CompactRenderer:
    return CompactRenderer(Vocabulary())


def spoken(renderer: CompactRenderer, said: str, seen: str = "") -> Rollout:
    """A rollout that observes `seen` and says `said`."""
    messages = [{"role": "user", "content": "day mon"}]
    observed, own = renderer.encode(seen.split()), renderer.encode(said.split())
    rollout = Rollout(task(), messages, [], renderer.prompt(messages, []), observed + own)
    rollout.generated = [False] * len(observed) + [True] * len(own)
    return rollout


def test_an_empty_reference_is_the_students_own_prompt(renderer: CompactRenderer) -> None:
    rollout = spoken(renderer, "ok")
    assert teacher_prompt(renderer, rollout, "") == rollout.prompt_ids
    assert teacher_prompt(renderer, rollout, "") is not rollout.prompt_ids
    rollout.prompt_ids = [7, 7, 7]  # what was sampled from counts, not what would be rendered today
    assert teacher_prompt(renderer, rollout, "") == [7, 7, 7]


def test_the_reference_enters_the_first_prompt_only(renderer: CompactRenderer) -> None:
    rollout = spoken(renderer, "ok")
    reference = "steps look answer . check look ."
    taught = teacher_prompt(renderer, rollout, reference)
    assert taught[-len(rollout.prompt_ids) :] == rollout.prompt_ids
    assert renderer.decode(taught[: -len(rollout.prompt_ids)]) == f"<ref> {reference} <end> "
    assert not set(renderer.encode(["steps", "check"])) & set(rollout.prompt_ids)


def test_literals_are_shielded_at_word_borders_in_generated_tokens(renderer: CompactRenderer) -> None:
    rollout = spoken(renderer, "it is 14 at hour 140", seen="hour 14")
    assert literal_mask(renderer, rollout, ["14"]) == [False, False, False, False, True, False, False, False]
    assert literal_mask(renderer, rollout, ["is 14"]) == [False, False, False, True, True, False, False, False]
    assert literal_mask(renderer, rollout, []) == [False] * 8
    assert literal_mask(renderer, rollout, ["", "  "]) == [False] * 8


@pytest.mark.parametrize(
    ("pieces", "literals", "hit"),
    [
        (["{", '"who', '": "', "Pa", "ris", '"}'], ["paris"], "000110"),
        (["Pa", "ris", "ian"], ["paris"], "000"),
        (['\\"Zo', "\\u00", "eb\\n", "Li", '"'], ["Zoë Li"], "11110"),
        (["1", "2", ",", "500", ".0", "0 "], ["12500"], "111111"),
        (["a ", "", "Paris", ""], ["Paris"], "0010"),
        (["Paris Paris"], ["Paris"], "1"),
        (["x", "Paris", " ", "Rome", "y"], ["Paris", "Rome"], "00000"),
        ([" Paris", " Rome"], ["Paris", "Rome"], "11"),
    ],
)
def test_literals_across_pieces_and_escapes(pieces: list[str], literals: list[str], hit: str) -> None:
    renderer: Any = Characters(pieces)
    rollout = Rollout(task(), [], [], [], list(range(len(pieces))), [True] * len(pieces))
    assert literal_mask(renderer, rollout, literals) == [c == "1" for c in hit]
