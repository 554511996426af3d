"""What the teacher reads: from a column of the data set, or from a function that is shown a group's siblings.

The reference goes into the first prompt only; the completion's tokens follow it as they were sampled, so student and
teacher align by the index of the generated token.
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
Reference = str | list[Message] | None  # a text for the prompt, the teacher's whole prompt, or nothing to say


@dataclass(frozen=True)
class Siblings:
    """One prompt and all its rollouts."""

    prompt: Prompt
    completions: list[Any]  # texts, or lists of messages where the prompt is one (tool calls and results included)
    completion_ids: list[list[int]]
    rewards: list[float]  # the weighted sum of the reward functions; NaN where none of them scored the rollout
    rows: list[dict[str, Any]]  # the data set's row, once for every rollout, with what a rollout function added


ReferenceFunc = Callable[[Siblings], Reference | Awaitable[Reference]]


def ask(function: ReferenceFunc, groups: Sequence[Siblings]) -> list[Reference]:
    """The reference of every group; an `async def` is asked about all of them at once."""
    if not inspect.iscoroutinefunction(function):
        return [function(group) for group in groups]  # type: ignore[misc]

    async def all_of_them() -> list[Reference]:
        return list(await asyncio.gather(*(function(group) for group in groups)))

    with ThreadPoolExecutor(1) as beside:  # a notebook's thread runs a loop already
        return beside.submit(lambda: asyncio.run(all_of_them())).result()


def teacher_prompt(prompt: Prompt, reference: Reference) -> Prompt | None:
    """The prompt that the teacher reads; None where there is no reference.

    A text goes under a heading to the end of the system message or, without one, before the first user's words (before
    the prompt where that is a text). Messages are the teacher's prompt as they are.

    Raises ValueError for messages beside a prompt of text, and for a prompt with neither system nor user message.
    """
    if not reference:
        return None
    if not isinstance(reference, str):
        if isinstance(prompt, str):
            raise ValueError("a reference is messages while its prompt is text; needs text, or a prompt of messages")
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
    """Contents one below the other: texts, or lists of parts."""
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(content for content in contents if isinstance(content, str) and content)
    parts = [[{"type": "text", "text": content}] if isinstance(content, str) else content for content in contents]
    return [part for some in parts for part in some]
