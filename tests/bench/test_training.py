"""The task that both trainers get."""

from __future__ import annotations

import asyncio

from bench.first_call import FirstCallSuite, gold_name, reward
from trainer.data import Message


def call(name: str) -> Message:
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": name, "arguments": "{}"}}]}


def test_the_first_call_decides_and_one_turn_is_all() -> None:
    suite = FirstCallSuite()
    tasks = suite.tasks("train")
    task = next(t for t in tasks if gold_name(t))
    assert reward(call(gold_name(task)), gold_name(task)) == 1.0
    assert reward(call("nonsense"), gold_name(task)) == 0.0
    assert reward({"role": "assistant", "content": "done"}, gold_name(task)) == 0.0

    async def play(message: Message) -> tuple[bool, float]:
        environment = suite.make()
        await environment.reset(task)
        _, over = await environment.step(message)
        outcome = await environment.outcome()
        await environment.close()
        return over, outcome.reward

    assert asyncio.run(play(call(gold_name(task)))) == (True, 1.0)
    assert asyncio.run(play(call("nonsense"))) == (True, 0.0)
    assert len({gold_name(t) for t in tasks}) > 3, "more than one answer is right somewhere"
