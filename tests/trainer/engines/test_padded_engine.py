"""The padded engine against the plain forward; and rows of a batch against each other: no state goes between them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.trainer import toy
from tests.trainer.engines.test_hf_engine import STOP, check, many
from trainer.data import Completion, Sampling
from trainer.engines.padded import PaddedEngine
from trainer.learning.model import hidden_states, layer_kinds
from trainer.learning.packing import right_pad

KINDS = ["llama", "qwen3", "sliding", "qwen3_5"]
FIRST, SECOND = list(range(3, 23)) * 2, [5, 9, 4, 8, 3] * 6


def engine(model: Any, **options: Any) -> PaddedEngine:
    return PaddedEngine(model, **{"slots": 8, "stop_ids": [STOP], "max_length": 200, **options})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [3, 8])
def test_logprobs_are_those_of_the_full_forward(kind: str, slots: int) -> None:
    """Unequal contexts, siblings, turns that end at different times, more episodes than slots."""
    model = toy.model(kind)
    for turns in asyncio.run(many(engine(model, slots=slots))):  # type: ignore[arg-type]
        for prompt, got in turns:
            check(model, prompt, got)


def test_same_seed_same_bits_and_another_seed_other_tokens() -> None:
    model = toy.model("qwen3_5")
    runs = [asyncio.run(many(engine(model, seed=seed), 6)) for seed in (0, 0, 1)]  # type: ignore[arg-type]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_length_limits_and_stop() -> None:
    model = toy.model("qwen3_5")

    async def ask(prompt: list[int], most: int, stop: Sequence[int] = (STOP,)) -> Completion:
        return (await engine(model, max_length=48, stop_ids=stop).generate(prompt, 1, Sampling(max_tokens=most)))[0]

    full, short = asyncio.run(ask(FIRST, 100, stop=())), asyncio.run(ask(SECOND, 3, stop=()))
    assert (len(full.ids), full.finish) == (48 - len(FIRST), "length")
    assert (len(short.ids), short.finish) == (3, "length")
    stopped = asyncio.run(ask(SECOND, 12, stop=range(24)))
    assert (len(stopped.ids), stopped.finish) == (1, "stop")
    assert asyncio.run(ask([3] * 48, 5)) == Completion([], [], "length")


def test_whatever_goes_wrong_reaches_every_caller() -> None:
    model = toy.model("qwen3_5")
    eng = engine(model, slots=1)

    def broken(*arguments: Any, **named: Any) -> Any:
        raise MemoryError("no room")

    model.get_decoder().forward = broken

    async def two() -> list[Any]:
        calls = [eng.generate(prompt, 2, Sampling(max_tokens=4)) for prompt in (FIRST, SECOND)]
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 300)

    assert [type(e) for e in asyncio.run(two())] == [MemoryError, MemoryError]


def test_a_cancelled_caller_takes_nothing_from_the_others() -> None:
    model = toy.model("qwen3_5")
    eng = engine(model, stop_ids=())

    async def one_leaves() -> Completion:
        leaving = asyncio.ensure_future(eng.generate(FIRST, 2, Sampling(max_tokens=100)))
        staying = asyncio.ensure_future(eng.generate(SECOND, 1, Sampling(max_tokens=20)))
        for _ in range(14):
            await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        return (await staying)[0]

    check(model, SECOND, asyncio.run(one_leaves()))


# What training reads: right-padded rows, one sequence a row.


def packed(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """What we do not do: sequences end to end in one row, positions starting again at each."""
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[i for row in rows for i in range(len(row))]])
    with torch.no_grad():
        states: torch.Tensor = model.get_decoder()(
            input_ids=ids, position_ids=positions, use_cache=False
        ).last_hidden_state[0]
    return states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", [0, 1])
def test_rows_of_a_batch_know_nothing_of_each_other(kind: str, changed: int) -> None:
    """Other tokens in one row change no bit of the other, in whichever of them the padding is."""
    model = toy.model(kind)
    rows = [FIRST, SECOND]
    other = [row if i != changed else [*reversed(row)] for i, row in enumerate(rows)]
    kept = 1 - changed
    with torch.no_grad():
        before, after = (hidden_states(model, right_pad(some, 0))[kept, : len(rows[kept])] for some in (rows, other))
        alone = hidden_states(model, torch.tensor([rows[kept]]))[0]
    assert torch.equal(before, after)
    torch.testing.assert_close(before, alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "leaks"), [("llama", False), ("qwen3", False), ("qwen3_5", True)])
def test_packing_leaks_through_a_recurrent_state(kind: str, leaks: bool) -> None:
    """Why rows are not packed: attention can be told where a sequence begins, the gated delta net is not."""
    model = toy.model(kind)
    before = packed(model, [FIRST, SECOND])[len(FIRST) :]
    after = packed(model, [[*reversed(FIRST)], SECOND])[len(FIRST) :]
    with torch.no_grad():
        alone = hidden_states(model, torch.tensor([SECOND]))[0]
    assert (not torch.equal(before, after)) == leaks
    assert (float((before - alone).abs().max()) > 1e-2) == leaks


def test_kinds_of_layers() -> None:
    assert {kind: layer_kinds(toy.model(kind)) for kind in KINDS} == {
        "llama": {"full_attention"},
        "qwen3": {"full_attention"},
        "sliding": {"full_attention", "sliding_attention"},
        "qwen3_5": {"full_attention", "linear_attention"},
    }
    model = toy.model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="no engine knows its layers of chunked_attention"):
        engine(model)
