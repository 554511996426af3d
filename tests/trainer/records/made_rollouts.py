"""Rollouts with given messages and lengths, for tests of the metrics."""

from __future__ import annotations

import json
from typing import Any

from trainer.data import Rollout, Task, TokenClass


def task(name: str = "t", kind: Any = "state_changing") -> Task:
    return Task(name, "toy", "dev", name, kind, "do it")


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "send", "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def rollout(reward: float, messages: Any = (), *, generated: int = 4, observed: int = 2, **fields: Any) -> Rollout:
    """A rollout whose generated tokens are all in turn 0, then as many observed ones."""
    n = generated + observed
    return Rollout(
        fields.pop("task", task()),
        fields.pop("prompt_messages", []),
        [],
        [1, 2],
        ids=list(range(n)),
        generated=[True] * generated + [False] * observed,
        logprobs=[0.0] * n,
        turns=[0] * n,
        classes=fields.pop("classes", [int(TokenClass.ANSWER)] * n),
        messages=list(messages),
        reward=reward,
        success=reward == 1,
        stop=fields.pop("stop", "answer"),
    )
