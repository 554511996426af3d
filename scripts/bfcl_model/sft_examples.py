"""Demonstrations as tokens: whole gold conversations of the training part, and first turns that carry a reference.

The teacher of SGCD is the policy with a reference in its prompt, so the policy must have met one. Its text comes from
the contrast writer's own grammar, over the gold path and simulated siblings that skip, swap or add a call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.bfcl_model.gold_conversations import demonstrate
from trainer.chat.chatml import ChatMLRenderer
from trainer.data import Message, Task, Tool
from trainer.envs.bfcl.suite import BfclSuite
from trainer.learning.sft import Example
from trainer.references.contrast import ANSWER, EMPTY_SHELL, Names, avoids, checks, deviation, format_reference


@dataclass(frozen=True)
class Mix:
    """What the examples are made of."""

    categories: tuple[str, ...] = ("base",)
    max_tokens: int = 1024  # of one example; a longer conversation ends where a user turn ends
    with_reference: float = 0.5  # share of the first turns that come once more, with a reference
    with_shell: float = 0.1  # ... and with a reference that says nothing
    seed: int = 0


async def examples(renderer: ChatMLRenderer, mix: Mix, on_task: Callable[[], None] = lambda: None) -> list[Example]:
    """All examples, in a fixed order."""
    rng = random.Random(mix.seed)
    made = []
    whole = BfclSuite(categories=mix.categories)
    first = BfclSuite(categories=mix.categories, max_user_turns=1)
    for conversation, opening in zip(whole.tasks("train"), first.tasks("train")):
        messages, tools, _ = await demonstrate(conversation)
        made.append(example(renderer, messages, tools, mix.max_tokens))
        reference = _reference(opening, tools, rng, mix)
        if reference:
            messages, tools, _ = await demonstrate(opening)
            made.append(example(renderer, messages, tools, mix.max_tokens, reference))
        on_task()
    return [e for e in made if any(e.loss_mask)]


def example(
    renderer: ChatMLRenderer, messages: Sequence[Message], tools: list[Tool], max_tokens: int, reference: str = ""
) -> Example:
    """Tokens exactly as a rollout would hold them; only what the assistant says carries loss.

    A conversation that is too long is cut before the first user turn that does not fit whole; empty if none does.
    """
    first = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
    ids = renderer.prompt(list(messages[:first]), tools, reference)
    mask = [False] * len(ids)
    fits = 0
    waiting: list[Message] = []
    for message in messages[first:]:
        if message["role"] != "assistant":
            waiting.append(message)
            continue
        if waiting:
            seen = renderer.observation(waiting)
            ids, mask, waiting = ids + seen, mask + [False] * len(seen), []
        turn = renderer.turn(message)
        ids, mask = ids + turn, mask + [True] * len(turn)
        if not message.get("tool_calls") and len(ids) <= max_tokens:
            fits = len(ids)
    return Example(ids[:fits], mask[:fits])


def _reference(task: Task, tools: list[Tool], rng: random.Random, mix: Mix) -> str:
    """A contrast-like reference for some first turns, the empty shell for a few, "" for the rest."""
    point = rng.random()
    if point < mix.with_shell:
        return EMPTY_SHELL
    if point >= mix.with_shell + mix.with_reference:
        return ""
    offered = [tool["function"]["name"] for tool in tools if not tool.get("unlisted")]
    gold: Names = tuple(call.name for turn in task.data["entry"].gold[:1] for call in turn)
    failures = [(*_spoiled(gold, offered, rng), ANSWER) for _ in range(rng.randint(1, 4))]
    steps = (*gold, ANSWER)
    return format_reference(steps, checks(steps, failures), avoids([steps], failures), deviation([steps], failures))


def _spoiled(gold: Names, offered: list[str], rng: random.Random) -> Names:
    """The gold path with one call left out, swapped, added, or only an argument wrong (the same names)."""
    at = rng.randrange(len(gold)) if gold else 0
    kind = rng.choice(["leave", "swap", "add", "argument"])
    if kind == "leave":
        return gold[:at] + gold[at + 1 :]
    if kind == "swap":
        return (*gold[:at], rng.choice(offered), *gold[at + 1 :])
    return (*gold[:at], rng.choice(offered), *gold[at:]) if kind == "add" else gold
