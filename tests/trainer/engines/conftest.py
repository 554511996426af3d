"""Fixtures of the tests that use stub servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer import toy
from tests.trainer.engines.vllm_servers import Process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the servers start with: other weights than any test trains."""
    path = tmp_path_factory.mktemp("model")
    toy.model(seed=99).save_pretrained(path)
    toy.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def processes(folder: Path) -> Iterator[list[Process]]:
    made = [Process(folder), Process(folder)]
    yield made
    for process in made:
        process.kill()


@pytest.fixture
def servers(processes: list[Process]) -> list[Process]:
    """Both, alive and well."""
    for process in processes:
        process.alive()
    return processes
