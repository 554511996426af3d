"""The teacher's references: from a column of the data set, or from a function that gets a group's siblings.

The reference goes into the first prompt only. The completion's tokens follow it as sampled, so student and teacher are
aligned by the index of the generated token.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Prompt = str | list[Message]
Reference = str | list[Message] | None  # a text for the prompt, the teacher's whole prompt, or no reference


@dataclass(frozen=True)
class Siblings:
    """One prompt and all its rollouts."""

    prompt: Prompt
    completions: list[Any]  # texts; lists of messages, tool calls and results included, if the prompt is one
    completion_ids: list[list[int]]
    rewards: list[float]  # the weighted sum of the reward functions; NaN where none of them scored the rollout
    rows: list[dict[str, Any]]  # the data set's row per rollout, with the fields that a rollout function added


ReferenceFunc = Callable[[Siblings], Reference | Awaitable[Reference]]


def ask(function: ReferenceFunc, groups: Sequence[Siblings]) -> list[Reference]:
    """The reference of every group; the calls of an `async def` run concurrently."""
    if not inspect.iscoroutinefunction(function):
        return [function(group) for group in groups]  # type: ignore[misc]

    async def all_of_them() -> list[Reference]:
        return list(await asyncio.gather(*(function(group) for group in groups)))

    with ThreadPoolExecutor(1) as beside:  # in a notebook this thread already runs an event loop
        return beside.submit(lambda: asyncio.run(all_of_them())).result()


def teacher_prompt(prompt: Prompt, reference: Reference) -> Prompt | None:
    """The teacher's prompt; None without a reference.

    A text is put under a heading at the end of the system message or, without one, before the first user message's text
    (or before the prompt, if that is a text). Messages are the teacher's prompt, unchanged.

    Raises ValueError for messages with a prompt of text, and for a prompt with neither a system nor a user message.
    """
    if not reference:
        return None
    if not isinstance(reference, str):
        if isinstance(prompt, str):
            raise ValueError("a reference is messages and its prompt is text; needs text, or a prompt of messages")
        return list(reference)
    block = f"# Reference\n{reference}"
    if isinstance(prompt, str):
        return f"{block}\n\n{prompt}"
    roles = [message["role"] for message in prompt]
    first = next((i for i, role in enumerate(roles) if role in ("system", "user")), None)
    if first is None:
        raise ValueError(f"a prompt of {', '.join(roles) or 'no'} messages takes no reference; needs system or user")
    said = [prompt[first].get("content") or "", block]
    content = _join(said if roles[first] == "system" else said[::-1])
    return [*prompt[:first], {**prompt[first], "content": content}, *prompt[first + 1 :]]


def _join(contents: Sequence[str | list[Message]]) -> str | list[Message]:
    """Join message contents, texts or lists of parts, with blank lines between."""
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(content for content in contents if isinstance(content, str) and content)
    parts = [[{"type": "text", "text": content}] if isinstance(content, str) else content for content in contents]
    return [part for some in parts for part in some]
