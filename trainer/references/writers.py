"""The writers of credit references, by name. If a writer fails, references are missing, but the run continues.

After `write`, every group has a `reference` ("" means none: it trains with W = 1) and a `reference_info`:
`writer`, `cached`, `tokens` (prompt + completion), `seconds`, and where they apply `error` (one word, a metric),
`sanitiser_hits` (kind -> count) and `literals` (what the writer wants masked during scoring).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from trainer.data import Group
from trainer.errors import UserError
from trainer.protocols import Renderer, Suite
from trainer.references.contrast import EMPTY_SHELL, contrast

if TYPE_CHECKING:
    from trainer.config import WriterConfig


class Writer(Protocol):
    """Fills `reference` and `reference_info` of the mixed groups; never raises for an endpoint's fault."""

    name: str

    async def write(self, groups: list[Group]) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        """Its state in a checkpoint, so that a budget for the whole run holds across resumes."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def describe(writer: str, group: Group) -> dict[str, Any]:
    """The `reference_info` of a group before anything is written: who writes, and why it may get no reference."""
    return {"writer": writer, **({"error": group.no_contrast} if group.no_contrast else {})}


class Stateless:
    """A writer that remembers nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ContrastWriter(Stateless):
    """Writes each mixed group's reference from its own siblings."""

    name = "contrast"

    async def write(self, groups: list[Group]) -> None:
        for group in groups:
            group.reference = contrast(group.rollouts) if group.contrasts else ""
            group.reference_info = {**describe(self.name, group), "cached": False, "tokens": 0, "seconds": 0.0}


class NoneWriter(Stateless):
    """No reference at all: the ablation in which SGCD must equal GRPO bit by bit."""

    name = "none"

    async def write(self, groups: list[Group]) -> None:
        for group in groups:
            group.reference, group.reference_info = "", {"writer": self.name}


class EmptyShellWriter(Stateless):
    """The frame of a reference without content: any effect that remains is style."""

    name = "empty_shell"

    async def write(self, groups: list[Group]) -> None:
        for group in groups:
            group.reference = EMPTY_SHELL if group.contrasts else ""
            group.reference_info = describe(self.name, group)


class WrongTaskWriter(Stateless):
    """The contrast reference of the next group in the batch that belongs to another scenario."""

    name = "wrong_task"

    async def write(self, groups: list[Group]) -> None:
        await ContrastWriter().write(groups)
        own = [(group.task.scenario, group.reference) for group in groups]
        for i, group in enumerate(groups):
            others = [text for scenario, text in own[i + 1 :] + own[:i] if scenario != group.task.scenario and text]
            group.reference = others[0] if group.contrasts and others else ""
            group.reference_info["writer"] = self.name
            if group.contrasts and not others:
                group.reference_info["error"] = "no_other_scenario"


def load(config: WriterConfig, suite: Suite, renderer: Renderer | None = None) -> Writer:
    """Build the writer that `config.name` names; what it lacks is reported here, before hours are spent."""
    if config.name == "openai":
        from trainer.references.openai_writer import OpenAIWriter

        return OpenAIWriter(config, suite, renderer)
    offline: dict[str, type[Writer]] = {
        "contrast": ContrastWriter,
        "none": NoneWriter,
        "wrong_task": WrongTaskWriter,
        "empty_shell": EmptyShellWriter,
    }
    if config.name not in offline:
        raise UserError(f"writer.name: no writer {config.name!r}; there are openai, {', '.join(offline)}")
    return offline[config.name]()
