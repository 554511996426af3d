"""What the teacher reads, which tokens are shielded from credit, and what of the reference leaks into the student.

The reference enters the first prompt only; every later token is appended as it was sampled, so student and teacher
align by the index into `rollout.ids` and never by absolute position.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

from trainer.credit.literals import spans
from trainer.types import Renderer, Rollout

PHRASE = 4  # words of a phrase that counts as copied


def teacher_prompt(renderer: Renderer, rollout: Rollout, reference: str) -> list[int]:
    """The prompt with the reference in it; without one, the student's prompt itself, so that d is exactly 0."""
    if not reference:
        return list(rollout.prompt_ids)
    return list(renderer.prompt(rollout.prompt_messages, rollout.tools, reference))


def literal_mask(renderer: Renderer, rollout: Rollout, literals: Sequence[str]) -> list[bool]:  # [T]
    """Mark the generated tokens whose text overlaps an answer-bearing literal: they keep W = 1."""
    mask = [False] * len(rollout.ids)
    if not literals:
        return mask
    pieces = renderer.pieces(rollout.ids)
    ends = list(accumulate(len(piece) for piece in pieces))
    first = 0
    for start, end in spans("".join(pieces), literals):
        while ends[first] <= start:
            first += 1
        token = first
        while token < len(ends) and ends[token] - len(pieces[token]) < end:
            mask[token] = rollout.generated[token]
            token += 1
    return mask


def leakage(renderer: Renderer, rollout: Rollout, reference: str, literals: Sequence[str]) -> dict[str, float]:
    """Measure privilege leakage: does the student speak words that only its teacher was shown?

    `reference_phrase_rate`: share of the student's 4-word phrases that occur in the reference. `literal_overlap`: share
    of the reference's values (words with a digit, and quoted text) that the student says although neither prompt nor
    observation showed them. `masked_literal_hits`: generated tokens that spell an answer-bearing literal.
    """
    said = generated_text(renderer, rollout)
    seen = renderer.decode(rollout.prompt_ids) + " " + observed_text(renderer, rollout)
    return {
        "reference_phrase_rate": phrase_rate(words(said), words(reference)),
        "literal_overlap": value_overlap(said, seen, reference),
        "masked_literal_hits": float(sum(literal_mask(renderer, rollout, literals))),
    }


def generated_text(renderer: Renderer, rollout: Rollout) -> str:
    return renderer.decode([i for i, own in zip(rollout.ids, rollout.generated, strict=True) if own])


def observed_text(renderer: Renderer, rollout: Rollout) -> str:
    return renderer.decode([i for i, own in zip(rollout.ids, rollout.generated, strict=True) if not own])


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def phrases(tokens: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + PHRASE]) for i in range(len(tokens) - PHRASE + 1)]


def phrase_rate(said: Sequence[str], reference: Sequence[str]) -> float:
    known = set(phrases(reference))
    spoken = phrases(said)
    return sum(phrase in known for phrase in spoken) / len(spoken) if spoken else 0.0


def value_overlap(said: str, seen: str, reference: str) -> float:
    """The share of the reference's own values that the student repeats without having seen them elsewhere."""
    quoted = re.findall(r"[\"'`]([^\"'`\n]{2,80})[\"'`]", reference.lower())
    values = {word for text in quoted for word in words(text)} | {w for w in words(reference) if re.search(r"\d", w)}
    private = values - set(words(seen))
    return len(private & set(words(said))) / len(private) if private else 0.0
