"""Writers that ask a stub endpoint, for tests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.trainer.siblings import ToySuite
from tests.trainer.stub_endpoint import StubEndpoint
from trainer.config import WriterConfig
from trainer.data import Group
from trainer.references import writers

KEY = "sk-test-0123456789abcdefXYZ"
QUICK = {"retry-after-ms": "5"}
MIXED = ((["look", "act"], 1.0), (["act"], 0.0))


def configured(stub: StubEndpoint | None, tmp_path: Path, **fields: Any) -> WriterConfig:
    base = {"name": "openai", "cache_dir": tmp_path / "cache", "timeout": 30.0, "max_retries": 2, "model": "stub"}
    address = {"base_url": stub.base_url} if stub else {}
    return WriterConfig(**{**base, **address, **fields})


def run(writer: writers.Writer, *groups: Group) -> None:
    asyncio.run(writer.write(list(groups)))


def ask(stub: StubEndpoint, tmp_path: Path, *groups: Group, suite: ToySuite | None = None, **fields: Any) -> Any:
    writer = writers.load(configured(stub, tmp_path, **fields), suite or ToySuite())
    run(writer, *groups)
    return writer
