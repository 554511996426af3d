"""The parameters of a chat request, and what to do without when a server refuses one by name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import openai

from trainer.data import Message

COMPLAINS = (400, 422, 500)  # of a request that is not understood; llama-cpp-python says 500
LIMIT = re.compile(r"(?i)max_?(?:completion_?|new_?)?tokens")
STREAM = re.compile(r"(?i)\bstream\b")
SYSTEM = re.compile(r"(?i)\bsystem.{0,40}\b(?:role|message|prompt)|\broles?\b.{0,40}\b(?:system|alternate)", re.DOTALL)


@dataclass(frozen=True)
class RequestShape:
    """What this endpoint understands, as far as is known. A field changes once at most, so asking again ends."""

    limit: str = "max_completion_tokens"  # or max_tokens, its older name
    stream: bool = True  # say stream: false; some servers stream unless told not to, others do not know the word
    system: bool = True  # a message of that role; some chat templates refuse it

    def arguments(self, model: str, messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
        """Keyword arguments of `chat.completions.create`."""
        shown = list(messages)
        if not self.system and len(shown) > 1 and shown[0]["role"] == "system":
            first, second, *rest = shown
            shown = [{**second, "content": f"{first['content']}\n\n{second['content']}"}, *rest]
        stream = {"stream": False} if self.stream else {}
        return {"model": model, "messages": shown, self.limit: max_tokens, **stream}

    def after(self, written: int | None, limit: int) -> RequestShape:
        """The shape after an answer of `written` tokens: more than `limit` show that the limit was ignored."""
        return replace(self, limit="max_tokens") if written is not None and written > limit else self

    def without(self, complaint: str) -> RequestShape | None:
        """A shape without what `complaint` names; None if it names nothing that can be changed."""
        changed = self
        if self.limit != "max_tokens" and LIMIT.search(complaint):
            changed = replace(changed, limit="max_tokens")
        if self.stream and STREAM.search(complaint):
            changed = replace(changed, stream=False)
        if self.system and SYSTEM.search(complaint):
            changed = replace(changed, system=False)
        return changed if changed != self else None


def complaint_of(error: openai.APIError) -> str:
    """What a server says about a request that it does not understand; "" if the error is of another kind."""
    status = getattr(error, "status_code", None)
    if status is not None and status not in COMPLAINS:
        return ""
    return error.body if isinstance(error.body, str) else json.dumps(error.body, ensure_ascii=False, default=str)
