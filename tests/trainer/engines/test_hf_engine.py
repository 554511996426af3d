"""The hf engine against the plain forward of the same model."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.trainer import toy
from trainer.data import Completion, Sampling
from trainer.engines.hf import HFEngine
from trainer.engines.token_sampling import sample

STOP = 2


def engine(model: Any, **options: Any) -> HFEngine:
    return HFEngine(model, **{"slots": 8, "stop_ids": [STOP], "max_length": 200, **options})


def logprobs(model: Any, ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """log p of every next token, by one full forward."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return (logits / temperature).log_softmax(-1)


def check(model: Any, prompt: Sequence[int], got: Completion, temperature: float = 1.0) -> None:
    ids = [*prompt, *got.ids]
    expected = logprobs(model, ids, temperature)[len(prompt) - 1 : -1].gather(1, torch.tensor(got.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(got.logprobs), expected, atol=1e-5, rtol=1e-5)


async def episode(eng: HFEngine, prompt: list[int], seed: int, turns: int = 3) -> list[tuple[list[int], Completion]]:
    """Turns with observations of 1 to 40 tokens: both the ridden-along and the prefilled kind."""
    rng = random.Random(seed)
    ids, out = list(prompt), []
    for _ in range(turns):
        (got,) = await eng.generate(ids, 1, Sampling(max_tokens=rng.randrange(2, 12)))
        out.append((list(ids), got))
        ids += got.ids + [rng.randrange(3, 24) for _ in range(rng.choice([1, 5, 15, 16, 17, 40]))]
    return out


async def many(eng: HFEngine, episodes: int = 12) -> list[list[tuple[list[int], Completion]]]:
    """More episodes than slots; prompts of siblings are the same and all begin alike."""
    rng = random.Random(1)
    shared = [rng.randrange(3, 24) for _ in range(20)]
    prompts = [shared + [rng.randrange(3, 24) for _ in range(5 + 6 * g)] for g in range(4)]
    return await asyncio.gather(*(episode(eng, prompts[i % 4], i) for i in range(episodes)))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("slots", [3, 8])
def test_logprobs_are_those_of_the_full_forward(kind: str, slots: int) -> None:
    model = toy.model(kind)
    for turns in asyncio.run(many(engine(model, slots=slots))):
        for prompt, got in turns:
            check(model, prompt, got)


def test_same_seed_same_bits_and_another_seed_other_tokens() -> None:
    model = toy.model()
    runs = [asyncio.run(many(engine(model, seed=seed))) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_state_continues_the_stream() -> None:
    model = toy.model()
    first = engine(model)
    asyncio.run(many(first, 4))
    state = first.generator.get_state()
    first.load_weights(model)
    expected = asyncio.run(many(first, 4))
    second = engine(model, seed=99)
    second.generator.set_state(state)
    assert asyncio.run(many(second, 4)) == expected


def test_a_turn_reads_only_what_is_new() -> None:
    model = toy.model()
    eng = engine(model)

    async def two_turns() -> None:
        prompt = list(range(3, 20)) * 3
        (got,) = await eng.generate(prompt, 1, Sampling(max_tokens=5))
        read = eng.fed_tokens + eng.prefilled_tokens
        (again,) = await eng.generate([*prompt, *got.ids, 4, 5], 1, Sampling(max_tokens=1))
        assert eng.fed_tokens + eng.prefilled_tokens - read == 3  # the last sampled token and two observed ones
        check(model, [*prompt, *got.ids, 4, 5], again)

    asyncio.run(two_turns())


def test_siblings_prefill_once_and_tasks_share_a_beginning() -> None:
    eng = engine(toy.model())

    async def siblings() -> None:
        tools = list(range(3, 20)) * 3
        a, b = [*tools, *[4] * 20], [*tools, *[5] * 20]
        await asyncio.gather(eng.generate(a, 4, Sampling(max_tokens=2)), eng.generate(b, 4, Sampling(max_tokens=2)))
        assert eng.prefilled_tokens == len(a) - 1 + 19  # `a` once, and what only `b` says

    asyncio.run(siblings())


def test_new_weights_forget_old_caches() -> None:
    """Without it, the second turn would read keys and values of the old weights."""
    model = toy.model()
    eng = engine(model)

    async def around_an_update() -> None:
        prompt = list(range(3, 20)) * 3
        (got,) = await eng.generate(prompt, 1, Sampling(max_tokens=5))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        eng.load_weights(model)
        longer = [*prompt, *got.ids, 4, 5]
        (again,) = await eng.generate(longer, 1, Sampling(max_tokens=8))
        check(model, longer, again)

    asyncio.run(around_an_update())


def test_load_weights_refuses_while_rollouts_run() -> None:
    eng = engine(toy.model())

    async def interrupted() -> None:
        running = asyncio.ensure_future(eng.generate([3, 4], 1, Sampling(max_tokens=100)))
        for _ in range(4):
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="running"):
            eng.load_weights(eng.model)
        running.cancel()

    asyncio.run(interrupted())


def test_limits() -> None:
    model = toy.model()
    eng = engine(model, stop_ids=[], max_length=40)

    async def run() -> None:
        (cut,) = await eng.generate([3] * 10, 1, Sampling(max_tokens=7))
        assert (len(cut.ids), cut.finish) == (7, "length")
        (full,) = await eng.generate([3] * 30, 1, Sampling(max_tokens=50))
        assert (len(full.ids), full.finish) == (10, "length")
        check(model, [3] * 30, full)
        assert await eng.generate([3] * 40, 1, Sampling()) == [Completion([], [], "length")]

    asyncio.run(run())


def test_a_stop_token_ends_the_turn_and_only_its_own() -> None:
    model = toy.model()
    eng = engine(model, slots=16)
    sampling = Sampling(max_tokens=30)
    all_of_them = asyncio.run(eng.generate([3, 4, 5], 16, sampling))
    lengths = {len(c.ids) for c in all_of_them}
    assert len(lengths) > 3
    for got in all_of_them:
        assert STOP not in got.ids[:-1]
        assert (got.finish == "stop") == (got.ids[-1] == STOP)
        assert len(got.ids) == len(got.logprobs)
        check(model, [3, 4, 5], got)
    # A finished row draws no more random numbers.
    assert eng.sampled_tokens == sum(len(c.ids) for c in all_of_them)


def test_temperature_is_applied_once_and_greedy_is_greedy() -> None:
    model = toy.model()
    eng = engine(model)
    prompt = [3, 4, 5]
    (warm,) = asyncio.run(eng.generate(prompt, 1, Sampling(temperature=0.5, max_tokens=9)))
    check(model, prompt, warm, temperature=0.5)
    (greedy,) = asyncio.run(eng.generate(prompt, 1, Sampling(temperature=0.0, max_tokens=9)))
    ids = [*prompt, *greedy.ids]
    assert greedy.ids == logprobs(model, ids)[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert set(greedy.logprobs) == {0.0}


def test_an_error_reaches_every_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    eng = engine(toy.model(), slots=2)

    async def run() -> list[Any]:
        waiting = [eng.generate([3, 4, i], 1, Sampling()) for i in range(5)]
        return await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 300)

    with monkeypatch.context() as patch:
        patch.setattr(eng, "_forward", lambda *a: (_ for _ in ()).throw(RuntimeError("no memory")))
        assert [str(e) for e in asyncio.run(run())] == ["no memory"] * 5
    assert all(isinstance(c[0], Completion) for c in asyncio.run(run()))  # and the engine lives


def test_a_cancelled_caller_frees_its_row() -> None:
    eng = engine(toy.model(), slots=1, stop_ids=[])

    async def run() -> None:
        first = asyncio.ensure_future(eng.generate([3], 1, Sampling(max_tokens=150)))
        for _ in range(4):
            await asyncio.sleep(0)
        first.cancel()
        (got,) = await asyncio.wait_for(eng.generate([4], 1, Sampling(max_tokens=3)), 300)
        assert len(got.ids) == 3
        assert 3 < eng.sampled_tokens < 150

    asyncio.run(run())


def test_sleep_gives_memory_back_and_waking_needs_nothing() -> None:
    model = toy.model()
    eng = engine(model)
    asyncio.run(eng.generate([3, 4], 2, Sampling()))
    eng.sleep()
    assert eng.cache.stores == []
    eng.wake()
    (got,) = asyncio.run(eng.generate([3, 4], 1, Sampling(max_tokens=4)))
    check(model, [3, 4], got)


def test_refuses_models_with_other_state() -> None:
    model = toy.model("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        engine(model)


def test_sample_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(len(logits))
    ids, logp = sample(logits, ones, ones, generator)
    frequency = torch.bincount(ids, minlength=4) / len(ids)
    torch.testing.assert_close(frequency, logits[0].softmax(-1), atol=0.012, rtol=0)
    torch.testing.assert_close(logp, logits.log_softmax(-1)[0, ids])


def test_sample_top_p_keeps_the_fewest_that_reach_it_and_renormalises() -> None:
    probs = torch.tensor([0.1, 0.5, 0.3, 0.1])
    rows = probs.log().expand(4_000, 4)
    generator = torch.Generator().manual_seed(0)
    ids, logp = sample(rows, torch.ones(4_000), torch.full((4_000,), 0.7), generator)
    assert set(ids.tolist()) == {1, 2}
    torch.testing.assert_close(logp.exp(), torch.where(ids == 1, 0.5, 0.3) / 0.8)
    only, _ = sample(rows, torch.ones(4_000), torch.full((4_000,), 0.01), generator)
    assert set(only.tolist()) == {1}
