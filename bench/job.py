"""What a process of the suite is told, and where it leaves word of what it is doing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.cases import Case


@dataclass
class Job:
    """Cases for one process to work through, in order."""

    cases: list[Case]
    providers: list[str]  # empty: all
    metrics: list[str]
    samples: int
    threads: int
    folder: str  # where the CSVs go; empty: nowhere
    deadline: float  # Unix time after which no case is begun; 0: none
    budget: float  # seconds, for the words of the rows that were not run
    files: list[str] = field(default_factory=list)  # --with
    failed: dict[str, dict[str, str]] = field(default_factory=dict)  # case -> provider -> how it ended a process

    def dump(self) -> str:
        return json.dumps({**asdict(self), "cases": [c.to_dict() for c in self.cases]})

    @staticmethod
    def load(text: str) -> Job:
        values: dict[str, Any] = json.loads(text)
        return Job(**{**values, "cases": [Case(**c) for c in values["cases"]]})


class Progress:
    """A file that says which case and provider are under way, for whoever finds the process dead."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, done: int, provider: str = "", bad: int = 0) -> None:
        self.path.write_text(json.dumps({"done": done, "provider": provider, "bad": bad}), encoding="utf-8")

    def read(self) -> tuple[int, str, int]:
        """(cases that are finished, the provider at work, wrong answers of our own)"""
        if not self.path.is_file():
            return 0, "", 0
        found = json.loads(self.path.read_text(encoding="utf-8"))
        return int(found["done"]), str(found["provider"]), int(found["bad"])
