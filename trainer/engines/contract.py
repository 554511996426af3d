"""What an engine must give, checked at each call of one that is a plug-in."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch

from trainer import plugins
from trainer.data import Completion, Sampling
from trainer.errors import EngineLost, ReportedError, UserError
from trainer.protocols import Engine

METHODS = (("generate", 3, True), ("load_weights", 1, False), ("sleep", 0, False), ("wake", 0, False))


class CheckedEngine:
    """An engine of somebody else's whose every fault is an `EngineLost` of one line: the run stops, and can resume."""

    def __init__(self, plugin: str, engine: Engine) -> None:
        self.plugin, self._engine = plugin, engine
        plugins.check_methods("engine.name", plugin, engine, METHODS)
        if not isinstance(getattr(engine, "generator", None), torch.Generator):
            raise UserError(f"engine.name: {plugin} has no torch.Generator as generator, needs one for checkpoints")
        self.generator = engine.generator

    async def generate(self, prompt_ids: Sequence[int], n: int, sampling: Sampling) -> list[Completion]:
        found = self._ask("generate", prompt_ids, n, sampling)
        if not inspect.isawaitable(found):
            raise self._lost("generate is not asynchronous, needs `async def generate`")
        try:
            completions = await found
        except ReportedError:
            raise
        except Exception as error:
            raise self._lost(f"generate raised {plugins.explain(error, plugins.file_of(self._engine))}") from error
        if not isinstance(completions, (list, tuple)) or len(completions) != n:
            raise self._lost(f"generate returned {completions!r:.60}, needs a list of {n} trainer.data.Completion")
        for completion in completions:
            if problem := completion_problem(completion, sampling):
                raise self._lost(f"generate returned {problem}")
        return list(completions)

    def load_weights(self, model: Any) -> None:
        self._ask("load_weights", model)

    def sleep(self) -> None:
        self._ask("sleep")

    def wake(self) -> None:
        self._ask("wake")

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._engine, method)(*arguments)
        except ReportedError:
            raise
        except Exception as error:
            raise self._lost(f"{method} raised {plugins.explain(error, plugins.file_of(self._engine))}") from error

    def _lost(self, what: str) -> EngineLost:
        return EngineLost(f"engine.name: {self.plugin}: {what}")


def completion_problem(completion: Any, sampling: Sampling) -> str:
    """What is wrong with one completion; "" for nothing."""
    if not isinstance(completion, Completion):
        return f"{completion!r:.60}, needs a trainer.data.Completion"
    ids, logprobs = completion.ids, completion.logprobs
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        return f"{ids!r:.60} as ids, needs a list of token ids (Python ints)"
    if not 0 < len(ids) <= sampling.max_tokens:
        return f"{len(ids)} tokens, needs 1 to {sampling.max_tokens}"
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        return f"{logprobs!r:.60} as logprobs, needs a list with one for each of {len(ids)} ids"
    if not all(isinstance(x, float) and isfinite(x) and x <= 1e-3 for x in logprobs):
        return f"{logprobs!r:.60} as logprobs, needs finite log-probs (not probabilities)"
    if completion.finish not in ("stop", "length"):
        return f"{completion.finish!r} as finish, needs 'stop' or 'length'"
    return ""
