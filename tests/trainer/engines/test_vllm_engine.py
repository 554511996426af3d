"""The vLLM engine against server processes that answer as vLLM does and fail in every way they can.

The true server is met by `make test-vllm`; what it answers is what the stub imitates.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import toy
from tests.trainer.engines.vllm_servers import DRAW, PROMPT, Process, draw, drift, engine
from trainer.data import Completion, Sampling
from trainer.engines.vllm import VLLMEngine
from trainer.engines.vllm_server import write_weights
from trainer.errors import EngineLost, EnvironmentBroken, UserError


def test_tokens_come_from_the_weights_that_were_loaded_last(servers: list[Process], tmp_path: Path) -> None:
    first, second = toy.model(seed=0), toy.model(seed=1)
    eng = engine(servers, tmp_path, first)
    before = [len(s.seen()["seen"]) for s in servers]
    completions = draw(eng)
    assert drift(first, completions) < 1e-4 < 0.1 < drift(second, completions)
    assert [len(s.seen()["seen"]) - b for s, b in zip(servers, before)] == [4, 4], "servers are taken in turn"
    eng.load_weights(second)
    assert drift(second, draw(eng)) < 1e-4
    for c in completions:
        assert (c.finish == "stop") == (c.ids[-1] in eng.stop_ids)
        assert len(c.ids) == 6 or c.finish == "stop"


def test_one_seed_draws_the_same_and_another_does_not(servers: list[Process], tmp_path: Path) -> None:
    draws = [draw(engine(servers, tmp_path, seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len({tuple(c.ids) for c in draws[0]}) > 1, "siblings differ"


@pytest.mark.parametrize(
    "fault",
    [
        *("die", "http_500", "http_429", "not_json", "drop", "wrong_version", "mixed", "lost_logprob", "aborted"),
        *("nan", "empty", "no_dev_mode"),
    ],
)
def test_what_one_server_spoils_the_other_gives(servers: list[Process], tmp_path: Path, fault: str) -> None:
    eng = engine(servers, tmp_path)
    wanted = draw(engine(servers, tmp_path))
    asyncio.run(eng.generate(PROMPT, 1, Sampling(max_tokens=1)))
    eng.generator.manual_seed(0)
    servers[1].fault(fault)
    assert draw(eng) == wanted, "the same draw, from the same weights"
    assert eng.servers[1].version == "" and eng.servers[0].version == eng.version


def test_a_passing_fault_costs_nothing_but_a_try(servers: list[Process], tmp_path: Path) -> None:
    eng, wanted = engine(servers, tmp_path), draw(engine(servers, tmp_path))
    for server in servers:
        server.fault("http_500", 1)
    assert draw(eng) == wanted


def test_a_server_that_hangs_is_left_out(servers: list[Process], tmp_path: Path) -> None:
    eng, wanted = engine(servers, tmp_path, timeout=5.0), draw(engine(servers, tmp_path))
    servers[1].fault("hang")
    assert draw(eng) == wanted
    assert [s.version == eng.version for s in eng.servers] == [True, False]


def test_a_server_that_answers_others_and_then_hangs_is_left_out(servers: list[Process], tmp_path: Path) -> None:
    """Of two requests it answers one after the other was sent: no reason to take the other for slow."""
    eng, wanted = engine(servers, tmp_path, timeout=5.0), draw(engine(servers, tmp_path), 4)
    servers[1].fault("hang", 1)

    async def hang_later() -> list[Completion]:
        drawn = asyncio.ensure_future(eng.generate(PROMPT, 4, DRAW))
        await asyncio.sleep(2.5)
        await asyncio.to_thread(servers[1].fault, "hang")
        return await drawn

    before = len(servers[1].seen()["seen"])
    assert asyncio.run(hang_later()) == wanted
    assert len(servers[1].seen()["seen"]) == before + 1, "it did answer one"
    assert [s.version == eng.version for s in eng.servers] == [True, False]


def test_a_server_that_is_restarted_is_waited_for(servers: list[Process], tmp_path: Path) -> None:
    """It is away for longer than all pauses between the tries together."""
    eng, wanted = engine(servers[:1], tmp_path, max_retries=1), draw(engine(servers, tmp_path))
    eng.generator.manual_seed(0)
    servers[0].kill()

    async def come_back() -> list[Completion]:
        drawn = asyncio.ensure_future(eng.generate(PROMPT, 8, DRAW))
        await asyncio.sleep(1.0)
        servers[0].start()
        return await drawn

    assert asyncio.run(come_back()) == wanted


def test_servers_that_stay_away_are_not_waited_for_longer_than_a_request(
    servers: list[Process], tmp_path: Path
) -> None:
    eng = engine(servers[:1], tmp_path, timeout=1.0)
    servers[0].kill()
    begun = time.monotonic()
    with pytest.raises(EngineLost, match=f"no server was there for 1 s: {servers[0].url}"):
        draw(eng)
    assert time.monotonic() - begun < 100


def test_a_cancelled_caller_leaves_no_writer_behind(
    servers: list[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writers in one folder would mix two sets of weights."""
    eng, writing, most = engine(servers, tmp_path), [0], [0]

    def slow(model: Any, folder: Path) -> None:
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        time.sleep(0.5)
        write_weights(model, folder)
        writing[0] -= 1

    monkeypatch.setattr("trainer.engines.vllm.write_weights", slow)

    async def give_up() -> list[Completion]:
        first = asyncio.ensure_future(eng.generate(PROMPT, 2, DRAW))
        await asyncio.sleep(0.1)
        first.cancel()
        return await eng.generate(PROMPT, 2, DRAW)

    assert drift(eng.model, asyncio.run(give_up())) < 1e-4
    assert most == [1]


def test_servers_sleep_at_level_one_and_wake_for_new_weights(servers: list[Process], tmp_path: Path) -> None:
    """Also for those of another run: one that was killed while its servers slept."""
    eng = engine(servers[:1], tmp_path)
    draw(eng)
    told = len(servers[0].seen()["told"])
    eng.sleep()
    eng.wake()
    draw(eng)
    eng.sleep()
    model = toy.model(seed=6)
    assert drift(model, draw(engine(servers[:1], tmp_path, model))) < 1e-4
    assert servers[0].seen()["told"][told:] == ["/sleep?level=1", "/wake_up"] * 2


def test_a_straggler_is_dropped_not_scored(servers: list[Process], tmp_path: Path) -> None:
    """One slow request while its server answers others: an episode's loss, not the server's."""
    eng = engine(servers[:1], tmp_path, timeout=4.0)
    draw(eng, 1)
    servers[0].fault("slow", 1)

    async def both() -> list[Any]:
        slow = asyncio.ensure_future(eng.generate(PROMPT, 1, DRAW))
        await asyncio.sleep(0.3)
        return await asyncio.gather(slow, eng.generate(PROMPT, 1, DRAW), return_exceptions=True)

    slow, quick = asyncio.run(both())
    assert isinstance(slow, EnvironmentBroken) and "engine.timeout = 4 s" in str(slow)
    assert len(quick) == 1
    assert eng.servers[0].version == eng.version, "the server is well"


def test_a_server_with_a_queue_is_not_taken_for_one_that_hangs(
    servers: list[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token that it is asked for waits behind others, which are answered meanwhile."""
    eng = engine(servers[:1], tmp_path, timeout=5.0, max_retries=0)
    draw(eng, 1)
    servers[0].fault("slow", 2)  # the turn, and the token

    async def both() -> tuple[Any, int]:
        slow = asyncio.ensure_future(eng.generate(PROMPT, 1, DRAW))
        await asyncio.sleep(6.0)  # now it waits for the token
        answered = 0
        while not slow.done():
            answered += len(await eng.generate(PROMPT, 1, DRAW))
            await asyncio.sleep(0.05)
        return slow.exception(), answered

    slow, answered = asyncio.run(both())
    assert isinstance(slow, EnvironmentBroken)
    assert answered
    assert eng.servers[0].version == eng.version


def test_a_server_that_was_restarted_is_not_believed_until_it_has_the_weights(
    servers: list[Process], tmp_path: Path
) -> None:
    model = toy.model(seed=3)
    eng = engine(servers[:1], tmp_path, model)
    draw(eng, 1)
    servers[0].kill()
    servers[0].start()
    servers[0].wait()
    assert drift(model, draw(eng)) < 1e-4
    labels = [s["label"] for s in servers[0].seen()["seen"]]
    assert labels == ["default"] * 8 + [eng.version] * 8, "the first eight were refused"
    assert servers[0].seen()["loads"] == 1, "eight requests, one reload"


@pytest.mark.parametrize("fault", ["load_500", "cache_held", "label_lost"])
def test_a_server_that_does_not_acknowledge_is_left_out(servers: list[Process], tmp_path: Path, fault: str) -> None:
    model = toy.model(seed=4)
    eng = engine(servers, tmp_path, model)
    servers[0].fault(fault)
    assert drift(model, draw(eng)) < 1e-4
    assert [s.version == eng.version for s in eng.servers] == [False, True]
    servers[0].fault("", 0)
    eng.load_weights(model)
    draw(eng)
    assert all(s.version == eng.version for s in eng.servers), "the next weights bring it back"
    for server in servers:
        server.fault(fault)
    eng.load_weights(model)
    with pytest.raises(EngineLost, match=f"{servers[0].url}: /.*{servers[1].url}: /.*3 tries"):
        draw(eng)


def test_weights_do_not_change_under_a_rollout(servers: list[Process], tmp_path: Path) -> None:
    eng = engine(servers, tmp_path)

    async def meddle() -> None:
        running = asyncio.ensure_future(eng.generate(PROMPT, 2, DRAW))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="two policies"):
            eng.load_weights(toy.model(seed=5))
        await running

    asyncio.run(meddle())
    eng.load_weights(toy.model(seed=5))


def test_a_request_that_no_server_would_take_is_not_tried_again(servers: list[Process], tmp_path: Path) -> None:
    eng = engine(servers, tmp_path)
    draw(eng, 1)
    for server in servers:
        server.fault("refuse")
    with pytest.raises(UserError, match=r"refuses.*400.*longer than max_model_len") as caught:
        draw(eng)
    assert not isinstance(caught.value, EngineLost)


def test_a_tied_head_is_served_as_its_own(tmp_path: Path) -> None:
    """vLLM on a CPU would keep the head's old copy: the folder must hold both tensors, and say that they are two."""
    model = toy.model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    write_weights(model, tmp_path / "w")
    stored = load_file(tmp_path / "w" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored["lm_head.weight"], model.get_input_embeddings().weight)
    assert json.loads((tmp_path / "w" / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings is True, "the trainer's own model is still tied"


def test_no_request_is_made_without_room(tmp_path: Path) -> None:
    eng = VLLMEngine(toy.model(), urls=["http://127.0.0.1:9"], folder=tmp_path, stop_ids=[3], max_length=5)
    assert asyncio.run(eng.generate(PROMPT, 2, DRAW)) == [Completion([], [], "length")] * 2
    with pytest.raises(ValueError, match="at least one"):
        asyncio.run(eng.generate([], 1, DRAW))
