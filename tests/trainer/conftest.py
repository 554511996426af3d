"""A toy model on disk, and the toy environment under its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer import toy
from trainer import envs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    toy.model("llama").save_pretrained(path)
    toy.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _parity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(envs.SUITES, "parity", toy.__name__)
