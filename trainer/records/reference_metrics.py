"""How many references were supplied, at what cost, and whether the policy has begun to quote them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from string import punctuation

from trainer.data import Group, Message, Rollout

PHRASE = 4  # words that make a phrase


def reference_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Supply of references, and whether the policy has begun to quote them. Empty for no groups."""
    if not groups:
        return {}
    infos = [g.reference_info for g in groups]
    served = [g for g in groups if g.reference]
    return {
        "reference/supplied": len(served) / len(groups),
        "reference/errors": float(sum(bool(i.get("error")) for i in infos)),
        **_count("reference/error", (str(i["error"]) for i in infos if i.get("error"))),
        "reference/sanitiser_hits": float(sum(sum((i.get("sanitiser_hits") or {}).values()) for i in infos)),
        "reference/cached": float(sum(bool(i.get("cached")) for i in infos)),
        "reference/tokens": float(sum(i.get("tokens") or 0 for i in infos)),
        "reference/seconds": float(sum(i.get("seconds") or 0.0 for i in infos)),
        "leak/phrase_rate": fmean(leaked_phrases(g) for g in served) if served else 0.0,
        "leak/argument_overlap": fmean(argument_overlap(g) for g in served) if served else 0.0,
    }


def _count(prefix: str, words: Iterable[str]) -> dict[str, float]:
    return {f"{prefix}/{word}": float(n) for word, n in sorted(Counter(words).items())}


def leaked_phrases(group: Group) -> float:
    """The share of rollouts whose generated text holds a phrase of the reference that no prompt or observation held."""
    reference = _phrases(group.reference)
    hits = 0
    for rollout in group.rollouts:
        generated = {p for m in rollout.messages if m["role"] == "assistant" for p in _phrases(_text(m))}
        shown = {p for text in _shown(rollout) for p in _phrases(text)}
        hits += bool((generated & reference) - shown)
    return hits / max(1, len(group.rollouts))


def argument_overlap(group: Group) -> float:
    """The share of tool-call argument values that are a word of the reference and were shown nowhere else."""
    reference = {word.strip(punctuation) for word in group.reference.lower().split()} - {""}
    taken = []
    for rollout in group.rollouts:
        shown = "\n".join(_shown(rollout)).lower()
        values = [value.lower() for m in rollout.messages for value in _arguments(m)]
        taken += [v in reference and not re.search(rf"(?<!\w){re.escape(v)}(?!\w)", shown) for v in values]
    return fmean(taken) if taken else 0.0


def _text(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _shown(rollout: Rollout) -> list[str]:
    """What the policy read: its prompt and every observation."""
    return [_text(m) for m in [*rollout.prompt_messages, *rollout.messages] if m["role"] != "assistant"]


def _phrases(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + PHRASE]) for i in range(len(words) - PHRASE + 1)}


def _arguments(message: Message) -> Iterator[str]:
    for call in message.get("tool_calls") or ():
        arguments = call["function"].get("arguments") or "{}"
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            continue
        if isinstance(parsed, dict):
            yield from (str(value) for value in parsed.values())
