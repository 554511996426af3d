"""The seed reaches Python, NumPy and torch, in this process and in those that are started."""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys
from multiprocessing.queues import SimpleQueue

import numpy as np
import pytest
import torch

from trainer import randomness


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(randomness.SEED, "0")
    monkeypatch.setenv("PYTHONHASHSEED", "0")


def draw() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_all_three_are_seeded() -> None:
    found = []
    for seed in (3, 3, 4):
        randomness.seed_all(seed)
        found.append(draw())
    assert found[0] == found[1]
    assert all(a != b for a, b in zip(found[0], found[2]))


def put(queue: SimpleQueue[tuple[float, ...]]) -> None:
    queue.put(draw())


def test_a_forked_worker_is_seeded() -> None:
    fork = multiprocessing.get_context("fork")
    found = []
    for seed in (3, 3, 4):
        randomness.seed_all(seed)
        draw()  # wherever this process is in its own sequence
        queue = fork.SimpleQueue()
        worker = fork.Process(target=put, args=(queue,))
        worker.start()
        found.append(queue.get())
        worker.join()
    assert found[0] == found[1] != found[2]


def test_other_processes_are_told() -> None:
    randomness.seed_all(11)
    code = "import os; print(os.environ['SGCD_SEED'], list({'a', 'b', 'c', 'd', 'e'}))"
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(3)}
    assert len(said) == 1 and said.pop().startswith("11 ")


def test_what_is_drawn_apart_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    randomness.seed_all(5)
    plain = (draw(), float(torch.rand((), generator=generator)))
    generator.manual_seed(1)
    randomness.seed_all(5)
    with randomness.separate(9, generator):
        apart = draw()
    assert apart != plain[0]
    assert (draw(), float(torch.rand((), generator=generator))) == plain
