"""What the teacher reads, and which tokens are masked from credit.

The reference enters the first prompt only; every later token is appended as it was sampled, so student and teacher
align by the index into `rollout.ids` and never by absolute position.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from trainer.data import Rollout
from trainer.protocols import Renderer
from trainer.references.literals import spans


def teacher_prompt(renderer: Renderer, rollout: Rollout, reference: str) -> list[int]:
    """The prompt with the reference in it; without a reference the student's prompt, so that d is exactly 0."""
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
