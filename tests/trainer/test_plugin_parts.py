"""Writers and engines by import path: they train, and what is wrong with one is named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import toy_run
from trainer import loop
from trainer.config import EngineConfig, WriterConfig
from trainer.data import Completion, Group
from trainer.engines.contract import completion_problem
from trainer.engines.hf import HFEngine
from trainer.errors import EngineLost, UserError
from trainer.protocols import Renderer
from trainer.references import writers
from trainer.references.writers import Stateless


class Said(Stateless):
    """A writer whose every reference is `text`; `fault` says what it does wrong."""

    name = "said"

    def __init__(self, suite: Any, text: str = "seen", fault: str = "") -> None:
        assert suite.name == "parity"
        self.text, self.fault = text, fault

    async def write(self, groups: list[Group]) -> None:
        if self.fault == "raises":
            raise ConnectionError("the notebook is gone")
        for group in groups:
            group.reference = self.text
            if self.fault == "number":
                group.reference = 3  # type: ignore[assignment]
            if self.fault == "info":
                group.reference_info = None  # type: ignore[assignment]


class Plain(Said):
    def write(self, groups: list[Group]) -> None:  # type: ignore[override]
        """Not asynchronous."""


class NoState:
    async def write(self, groups: list[Group]) -> None: ...


class Mine(HFEngine):
    """The engine of the trainer under another name; `fault` says what it does wrong."""

    def __init__(self, model: Any, renderer: Renderer, fault: str = "") -> None:
        super().__init__(model, slots=16, stop_ids=renderer.stop_ids, max_length=200, seed=0)
        self.fault = fault

    async def generate(self, prompt_ids: Any, n: int, sampling: Any) -> Any:
        found = await super().generate(prompt_ids, n, sampling)
        if self.fault == "raises":
            raise OSError("the device is gone")
        return None if self.fault == "none" else found[:0] if self.fault == "fewer" else found


def path(thing: type) -> str:
    return f"{__name__}:{thing.__name__}"


def test_a_run_with_a_writer_and_an_engine_of_ones_own(folder: Path, tmp_path: Path) -> None:
    """The engine is the trainer's own, so the run samples the same tokens."""
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    fields: dict[str, Any] = {"max_steps": 2, "eval_on_start": False, "vllm_importance_sampling_correction": False}
    writer = WriterConfig(name=path(Said), options={"text": "seen even"})
    loop.train(toy_run.config(folder, own, writer=writer, **fields))
    loop.train(toy_run.config(folder, theirs, writer=writer, engine=EngineConfig(name=path(Mine)), **fields))
    assert toy_run.identical(own, theirs)
    metrics = toy_run.records(theirs)[-1]
    assert metrics["reference/errors"] == 0 and metrics["credit/mean_divergence"] > 0


@pytest.mark.parametrize("fault", ["raises", "number", "info"])
def test_a_writer_that_fails_costs_references_and_not_the_run(
    folder: Path, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = toy_run.config(
        folder,
        tmp_path,
        max_steps=1,
        eval_on_start=False,
        writer=WriterConfig(name=path(Said), options={"fault": fault}),
    )
    with caplog.at_level(logging.WARNING):
        loop.train(config)
    record = toy_run.records(tmp_path)[-1]
    assert record["reference/error/writer_broke"] == record["reference/errors"] > 0
    assert f"{path(Said)}: write " in caplog.text
    if fault == "raises":
        assert "write raised ConnectionError: the notebook is gone (test_plugin_parts.py, line" in caplog.text


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("raises", r"generate raised OSError: the device is gone"),
        ("none", "generate returned None, needs a list of 1 trainer.data.Completion"),
        ("fewer", r"generate returned \[\], needs a list of 1"),
    ],
)
def test_an_engine_that_fails_stops_the_run(folder: Path, tmp_path: Path, fault: str, why: str) -> None:
    config = toy_run.config(folder, tmp_path, engine=EngineConfig(name=path(Mine), options={"fault": fault}))
    with pytest.raises(EngineLost, match=f"engine.name: {path(Mine)}: {why}"):
        loop.train(config)


def test_what_is_no_writer_is_refused(folder: Path) -> None:
    suite: Any = type("S", (), {"name": "parity"})()
    for name, options, why in (
        (path(NoState), {}, "has no method state_dict, needs `def state_dict` with no argument; has no method load_"),
        (path(Said), {"txt": "x"}, "writer.options: .* has no option 'txt'; there are text, fault"),
        (path(Said), {"suite": 1}, "writer.options: .* has no option 'suite'"),
        (path(Group), {}, "missing a required argument: 'task'"),
        ("no_such:Writer", {}, "writer.name: no_such:Writer cannot be imported"),
    ):
        with pytest.raises(UserError, match=why):
            writers.load(WriterConfig(name=name, options=options), suite)


def test_a_writer_that_is_not_asynchronous_is_named(caplog: pytest.LogCaptureFixture) -> None:
    import asyncio

    from tests.trainer.siblings import rollout, task

    suite: Any = type("S", (), {"name": "parity"})()
    group = Group(task(), [rollout(["look"], 1.0), rollout(["act"], 0.0)])
    asyncio.run(writers.load(WriterConfig(name=path(Plain)), suite).write([group]))
    assert group.reference == "" and "write is not asynchronous, needs `async def write`" in caplog.text


@pytest.mark.parametrize(
    ("completion", "why"),
    [
        ([1, 2], "needs a trainer.data.Completion"),
        (Completion([], [], "stop"), "0 tokens, needs 1 to 2"),
        (Completion([1, 2, 3], [-1.0] * 3, "length"), "3 tokens, needs 1 to 2"),
        (Completion([1.5], [-1.0], "stop"), "needs a list of token ids"),  # type: ignore[list-item]
        (Completion([1, 2], [-1.0], "stop"), "needs a list with one for each of 2 ids"),
        (Completion([1], [0.4], "stop"), "needs finite log-probs"),
        (Completion([1], [float("nan")], "stop"), "needs finite log-probs"),
        (Completion([1], [-1.0], "eos"), "needs 'stop' or 'length'"),  # type: ignore[arg-type]
        (Completion([1], [-1.0], "stop"), ""),
    ],
)
def test_what_a_completion_must_be(completion: Any, why: str) -> None:
    from trainer.data import Sampling

    problem = completion_problem(completion, Sampling(max_tokens=2))
    assert why in problem and bool(why) == bool(problem)
