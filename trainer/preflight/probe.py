"""The results of the checks so far, for later checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.preflight.memory_footprint import Facts, Memory
from trainer.protocols import Renderer, Suite

if TYPE_CHECKING:
    from trainer.config import Config

T = TypeVar("T")


class Skipped(Exception):
    """A check needs something that an earlier one did not find."""


@dataclass
class Probe:
    """The config, and the results of checks: None or False until their check has passed."""

    config: Config
    facts: Facts | None = None  # of the model, from its config.json
    memory: Memory | None = None  # what the run needs of the device
    fits: bool = False  # the device has that memory
    model: Any = None
    renderer: Renderer | None = None
    user_simulator: bool = False  # its endpoint answers, or the environment needs none
    suite: Suite | None = None
    engine: bool = False
    warnings: list[str] = field(default_factory=list)  # of the running check: slow or unusual, but not wrong


def require(found: T | None, check: str) -> T:
    """What the check of that name has found.

    Raises:
        Skipped: it has not.
    """
    if found is None or found is False:
        raise Skipped(f"{check!r} must pass first")
    return found
