"""The colocated engine against vLLM itself: `make test-vllm` runs this in vLLM's environment, elsewhere it is skipped.

One engine for all tests: vLLM allows one a process.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

pytest.importorskip("vllm")

from tests.trainer import toy
from tests.trainer.engines.vllm_servers import DRAW, PROMPT, drift, records
from trainer import envs, loop
from trainer.config import Config, EngineConfig, EnvConfig, ModelConfig
from trainer.data import Completion, Sampling
from trainer.engines import vllm_launch
from trainer.engines.vllm_colocated import ColocatedEngine
from trainer.errors import EngineLost
from trainer.records import checkpoint


def make(seed: int) -> Any:
    """Random weights in a shape that vLLM takes on a CPU: heads of 32, and a tied embedding, which is the hard case."""
    shape = {"vocab_size": 24, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, **heads, tie_word_embeddings=True)).eval()
    with torch.no_grad():
        model.model.norm.weight.normal_().mul_(8.0)  # sharp, and not the last token again
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make(99).save_pretrained(path)
    toy.tokenizer().save_pretrained(path)
    return path


def config(folder: Path, out: Path, **fields: Any) -> Config:
    args = ["--dtype", "float32", "--enforce-eager"]
    defaults: dict[str, Any] = {
        "output_dir": out,
        "model": ModelConfig(path=str(folder), max_length=200),
        "env": EnvConfig(name="parity", max_turns=3, timeout=10.0),
        "engine": EngineConfig(name="vllm", vllm_mode="colocate", slots=8, server_args=args),
        "arm": "grpo",
        "num_generations": 8,
        "groups_per_step": 2,
        "max_completion_length": 12,
        "max_steps": 2,
        "eval_on_start": False,
        "eval_steps": 2,
        "save_steps": 0,
        "learning_rate": 1e-2,
    }
    return Config(**{**defaults, **fields})


@pytest.fixture(scope="module")
def only(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The one vLLM of this process, started from weights that no test uses."""
    out = tmp_path_factory.mktemp("out")
    made = vllm_launch.engine(config(folder, out), make(98), toy.renderer())
    assert isinstance(made, ColocatedEngine)
    assert not list(out.iterdir()), "the folder that it started from is gone"
    return made._vllm


def engine(only: Any, model: Any, seed: int = 0) -> ColocatedEngine:
    return ColocatedEngine(model, engine=only, stop_ids=toy.renderer().stop_ids, max_length=200, seed=seed)


def draw(eng: ColocatedEngine, n: int = 8, prompt: list[int] = PROMPT) -> list[Completion]:
    return asyncio.run(eng.generate(prompt, n, DRAW))


def test_tokens_come_from_the_weights_that_were_loaded_last(only: Any) -> None:
    first, second = make(0), make(1)
    eng = engine(only, first)
    completions = draw(eng)
    assert drift(first, completions) < 1e-4 < 0.1 < drift(second, completions)
    eng.load_weights(second)
    completions = draw(eng)
    assert drift(second, completions) < 1e-4
    for c in completions:
        assert (c.finish == "stop") == (c.ids[-1] in eng.stop_ids)
        assert len(c.ids) == 6 or c.finish == "stop"


def test_keys_and_values_of_old_weights_are_forgotten(only: Any) -> None:
    """A prompt of several blocks, which the prefix cache would hold."""
    first, second, long = make(0), make(1), PROMPT * 20
    eng = engine(only, first)
    assert drift(first, draw(eng, 4, long), long) < 1e-4
    eng.load_weights(second)
    assert drift(second, draw(eng, 4, long), long) < 1e-4


def test_log_probs_are_of_the_distribution_that_was_drawn_from(only: Any) -> None:
    model = make(0)
    (cold,) = asyncio.run(engine(only, model).generate(PROMPT, 1, Sampling(temperature=0.5, max_tokens=4)))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + cold.ids])).logits[0, len(PROMPT) - 1 : -1] / 0.5
    own = logits.log_softmax(-1).gather(1, torch.tensor(cold.ids)[:, None])[:, 0]
    assert torch.allclose(own, torch.tensor(cold.logprobs), atol=1e-4)


def test_one_seed_draws_the_same_and_another_does_not(only: Any) -> None:
    draws = [draw(engine(only, make(0), seed)) for seed in (0, 0, 1)]
    assert [c.ids for c in draws[0]] == [c.ids for c in draws[1]] != [c.ids for c in draws[2]]
    assert len({tuple(c.ids) for c in draws[0]}) > 1, "siblings differ"


def test_nothing_changes_under_a_rollout(only: Any) -> None:
    eng = engine(only, make(0))

    async def meddle() -> None:
        running = asyncio.ensure_future(eng.generate(PROMPT, 2, DRAW))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="two policies"):
            eng.load_weights(make(1))
        with pytest.raises(RuntimeError, match="would be lost"):
            eng.sleep()
        await running

    asyncio.run(meddle())
    eng.load_weights(make(1))


@pytest.mark.parametrize("woken", [True, False])
def test_a_sleeper_wakes_with_the_new_weights(only: Any, woken: bool) -> None:
    eng, second = engine(only, make(0)), make(1)
    draw(eng)
    eng.sleep()
    assert only.is_sleeping()
    if woken:
        eng.wake()
        eng.load_weights(second)
    else:
        eng.load_weights(second)
    assert drift(second, draw(eng)) < 1e-4
    assert not only.is_sleeping()


def test_a_caller_that_is_cancelled_leaves_nothing_behind(only: Any) -> None:
    eng = engine(only, make(0))

    async def give_up() -> list[Completion]:
        asked = asyncio.ensure_future(eng.generate(PROMPT, 3, Sampling(max_tokens=150)))
        other = asyncio.ensure_future(eng.generate(PROMPT, 2, DRAW))
        for _ in range(10):
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert asked.cancelled()
        return await other

    assert drift(eng.model, asyncio.run(give_up())) < 1e-4
    assert not only.has_unfinished_requests()
    eng.load_weights(make(1))


def test_a_failure_reaches_every_caller(only: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eng = engine(only, make(0))
    draw(eng, 1)

    def broken() -> Any:
        raise RuntimeError("out of memory")

    async def two() -> list[Any]:
        return await asyncio.gather(*(eng.generate(PROMPT, 2, DRAW) for _ in range(2)), return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(only, "step", broken)
        failed = asyncio.run(two())
    assert all(isinstance(f, EngineLost) and "RuntimeError: out of memory" in str(f) for f in failed)
    assert drift(eng.model, draw(eng)) < 1e-4, "and nothing of it is left"


def test_an_answer_that_is_not_whole_reaches_its_caller(only: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one too, when nobody else waits any more."""
    eng, step = engine(only, make(0)), only.step
    draw(eng, 1)

    def aborted() -> Any:
        outputs = step()
        for output in outputs:
            output.outputs[0].finish_reason = "abort"
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(only, "step", aborted)
        with pytest.raises(EngineLost, match="finished with 'abort'"):
            asyncio.run(asyncio.wait_for(eng.generate(PROMPT, 1, DRAW), 60))
    assert drift(eng.model, draw(eng)) < 1e-4


def test_no_request_is_made_without_room(only: Any) -> None:
    eng = ColocatedEngine(make(0), engine=only, stop_ids=[3], max_length=5)
    assert draw(eng, 2) == [Completion([], [], "length")] * 2
    with pytest.raises(ValueError, match="at least one"):
        asyncio.run(eng.generate([], 1, DRAW))


def test_a_run_that_fails_resumes_from_its_checkpoint(
    only: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(envs.SUITES, "parity", toy.__name__)
    monkeypatch.setattr(vllm_launch, "colocated", lambda made, model, renderer, folder: engine(only, model))
    made, whole = config(folder, tmp_path / "run"), config(folder, tmp_path / "whole")
    sample = loop.Run.sample_siblings

    async def doomed(run: loop.Run, clock: Any, logger: Any) -> Any:
        if run.step == 1:
            patch.setattr(only, "step", lambda: 1 / 0)
        return await sample(run, clock, logger)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "sample_siblings", doomed)
        with pytest.raises(EngineLost, match="ZeroDivisionError"):
            loop.train(made)
    newest = checkpoint.latest(made.output_dir)
    assert newest is not None and newest.name == "step_1"
    loop.train(made)
    loop.train(whole)
    lines = [records(run.output_dir) for run in (made, whole)]
    assert [line["step"] for line in lines[0]] == [1, 2] and lines[0] == lines[1]
    for line in lines[0]:
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["rollout/errored"] == 0
