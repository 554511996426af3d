"""The writers of credit references, by name or import path. If one fails, references are missing and the run continues.

After `write`, every group has a `reference` ("" means none: it trains with W = 1) and a `reference_info`:
`writer`, `cached`, `tokens` (prompt + completion), `seconds`, and where they apply `error` (one word, a metric),
`sanitiser_hits` (kind -> count) and `literals` (what the writer wants masked during scoring).
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any, Protocol

from trainer import plugins
from trainer.data import Group
from trainer.errors import RunFailed
from trainer.protocols import Renderer, Suite
from trainer.references.contrast import EMPTY_SHELL, contrast

if TYPE_CHECKING:
    from trainer.config import WriterConfig


log = logging.getLogger(__name__)
METHODS = (("write", 1, True), ("state_dict", 0, False), ("load_state_dict", 1, False))


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


class CheckedWriter:
    """A writer of somebody else's: where it fails, or gives no text, the group has no reference and says why."""

    def __init__(self, plugin: str, writer: Writer) -> None:
        plugins.check_methods("writer.name", plugin, writer, METHODS)
        self.name = str(getattr(writer, "name", plugin))
        self._plugin, self._writer = plugin, writer

    async def write(self, groups: list[Group]) -> None:
        problem = ""
        try:
            written: Any = self._writer.write(groups)
            if inspect.isawaitable(written):
                await written
            else:
                problem = "write is not asynchronous, needs `async def write`"
        except Exception as error:
            problem = f"write raised {plugins.explain(error, plugins.file_of(self._writer))}"
        for group in groups:
            if lacks := problem or _problem(group.reference, group.reference_info):
                group.reference, group.reference_info = "", {"error": "writer_broke"}
                log.warning("%s: %s; %s trains without a reference", self._plugin, lacks, group.task.id)
            group.reference_info = {**describe(self.name, group), **group.reference_info}

    def state_dict(self) -> dict[str, Any]:
        return self._ask("state_dict")  # type: ignore[no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ask("load_state_dict", state)

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._writer, method)(*arguments)
        except Exception as error:
            why = plugins.explain(error, plugins.file_of(self._writer))
            raise RunFailed(f"writer.name: {self._plugin}: {method} raised {why}") from error


def _problem(reference: Any, info: Any) -> str:
    """What is wrong with what a writer left; "" for nothing."""
    if not isinstance(reference, str):
        return f"write left a {type(reference).__name__} as reference, needs text"
    return "" if isinstance(info, dict) else f"write left a {type(info).__name__} as reference_info, needs a dict"


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
    if config.name in offline:
        return offline[config.name]()
    thing = plugins.find("writer.name", config.name, plugins.WRITERS)
    offered = {"config": config, "suite": suite, "renderer": renderer}
    return CheckedWriter(config.name, plugins.build("writer.name", config.name, thing, config.options, **offered))
