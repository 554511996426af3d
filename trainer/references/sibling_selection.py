"""Selects the siblings that the writer sees if all of them are too long together (METHOD section 2.2).

Equal numbers of successes and failures are shown, at most all of the smaller class. If there are more successes, the
shortest of them (the clean ones); if there are more failures, the longest of them (those that went far before they
failed).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
LEFT_OUT = "[...]"  # without letters and digits, since an answer could be any word or number


def select(
    successes: Sequence[T], failures: Sequence[T], size: Callable[[T], int], max_size: int
) -> tuple[list[T], list[T]]:
    """Return what is shown of each class, in the order given; at least one of each, even when a pair is too long."""
    if total(successes, failures, size) <= max_size:
        return list(successes), list(failures)
    good = sorted(successes, key=size)
    bad = sorted(failures, key=size, reverse=len(failures) > len(successes))
    pairs = min(len(good), len(bad))
    while pairs > 1 and total(good[:pairs], bad[:pairs], size) > max_size:
        pairs -= 1
    return in_order(successes, good[:pairs]), in_order(failures, bad[:pairs])


def total(successes: Sequence[T], failures: Sequence[T], size: Callable[[T], int]) -> int:
    return sum(map(size, successes)) + sum(map(size, failures))


def in_order(items: Sequence[T], chosen: Sequence[T]) -> list[T]:
    wanted = {id(item) for item in chosen}
    return [item for item in items if id(item) in wanted]


def cut_middle(text: str, limit: int, whole: re.Pattern[str] | None = None) -> str:
    """Cut the middle out of a text, to about `limit` characters, and mark the cut: both ends say most.

    A match of `whole` at the cut is left out, never split.
    """
    if len(text) <= limit:
        return text
    half = max(limit // 2, 1)
    first, last = half, len(text) - half
    for match in whole.finditer(text) if whole else ():
        first = match.start() if match.start() < first < match.end() else first
        last = match.end() if match.start() < last < match.end() else last
    return f"{text[:first]} {LEFT_OUT} {text[last:]}"
