"""The offline writer: a reference from the contrast between the siblings' own traces.

Deterministic and free of values: it speaks in the names of tools that were offered, never in arguments, observations or
hidden labels. The grammar is at the level of words, so that a policy with a small word-level vocabulary reads it:

    steps TOOL TOOL answer . check TOOL . avoid TOOL . deviate after TOOL .
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.data import Rollout

MAX_STEPS = 24  # words of one section; beyond that a reference crowds the context it is meant to explain
ANSWER = "answer"
START = "start"
EMPTY_SHELL = "steps . check . avoid . deviate ."

Names = tuple[str, ...]


def format_reference(
    steps: Sequence[str], check: Sequence[str] = (), avoid: Sequence[str] = (), deviate: str | None = None
) -> str:
    """Spell a reference in the grammar above. Empty sections are left out; `steps` always ends in `answer`."""
    tools = [name for name in steps if name != ANSWER][: MAX_STEPS - 1]
    sections = [["steps", *tools, ANSWER]]
    if check:
        sections.append(["check", *check[:MAX_STEPS]])
    if avoid:
        sections.append(["avoid", *avoid[:MAX_STEPS]])
    if deviate:
        sections.append(["deviate", "after", deviate])
    return " ".join(" ".join([*section, "."]) for section in sections)


def contrast(rollouts: Sequence[Rollout]) -> str:
    """Write the reference of one mixed group; "" when an outcome class is empty, for then nothing contrasts."""
    successes = [path(r) for r in rollouts if r.success]
    failures = [path(r) for r in rollouts if not r.success]
    if not successes or not failures:
        return ""
    steps = min(successes, key=lambda names: (len(names), names))
    return format_reference(steps, checks(steps, failures), avoids(successes, failures), deviation(successes, failures))


def path(rollout: Rollout) -> Names:
    """The names of one episode's calls in order, then `answer` if it ended in text.

    Only offered tools count: a name that the policy made up could carry anything.
    """
    offered = {tool["function"]["name"] for tool in rollout.tools}
    names = [name for message in rollout.messages for name in called(message) if name in offered]
    last = rollout.messages[-1] if rollout.messages else {}
    closed = last.get("role") == "assistant" and not last.get("tool_calls")
    return (*names, ANSWER) if closed else tuple(names)


def called(message: Mapping[str, Any]) -> list[str]:
    """The tool names of one assistant message; a malformed call has none."""
    if message.get("role") != "assistant":
        return []
    functions = [(call or {}).get("function") or {} for call in message.get("tool_calls") or []]
    return [function["name"] for function in functions if isinstance(function.get("name"), str)]


def checks(steps: Names, failures: Sequence[Names]) -> list[str]:
    """What the shortest success calls and at least one failure does not, in the order of the steps."""
    return [name for name in dict.fromkeys(steps) if name != ANSWER and any(name not in f for f in failures)]


def avoids(successes: Sequence[Names], failures: Sequence[Names]) -> list[str]:
    """What failures call and no success does; the commonest first, then the earliest."""
    good = {name for names in successes for name in names} | {ANSWER}
    counts = Counter(name for names in failures for name in dict.fromkeys(names) if name not in good)
    return [name for name, _ in counts.most_common()]


def deviation(successes: Sequence[Names], failures: Sequence[Names]) -> str | None:
    """The last common call before the commonest failure leaves every success; None when no name tells them apart."""
    prefixes = {names[:n] for names in successes for n in range(len(names) + 1)}
    points = [last_common(names, prefixes) for names in failures]
    counts = Counter(point for point in points if point is not None)
    return counts.most_common(1)[0][0] if counts else None


def last_common(names: Names, prefixes: set[Names]) -> str | None:
    """Follow the successes' prefix tree; None if the whole path lies within it (the mistake is then in a value)."""
    for n in range(1, len(names) + 1):
        if names[:n] not in prefixes:
            return names[n - 2] if n > 1 else START
    return None
