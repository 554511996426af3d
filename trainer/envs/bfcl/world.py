"""One episode's API objects, and the only way to touch them: documented methods, called by name."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from trainer.envs.bfcl.calls import Call
from trainer.envs.bfcl.data import APIS, INSTALL, Entry, documentation
from trainer.errors import EnvironmentBroken, UserError

SOURCE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
STATELESS = {"MathAPI"}
MAX_MAGNITUDE = 1_000  # of the numbers that say how much work a calculation is
WORK = {"exponent", "precision", "decimal_places"}


class World:
    """The API objects of `entry`, freshly loaded. Nothing is shared between two worlds."""

    def __init__(self, entry: Entry):
        self._objects = {api: self._load(api, entry) for api in entry.classes}
        self._methods = {
            tool["function"]["name"]: getattr(self._objects[api], tool["function"]["name"])
            for api in entry.classes
            for tool in documentation(api)
        }

    @staticmethod
    def _load(api: str, entry: Entry) -> Any:
        try:
            thing = getattr(importlib.import_module(f"{SOURCE}.{APIS[api]}"), api)()
        except ImportError as error:
            raise UserError(f"env.name: bfcl cannot load {api} ({error}): pip install mpmath and {INSTALL}") from error
        if api not in STATELESS:
            config = copy.deepcopy(entry.initial_config.get(api, {}))
            try:
                thing._load_scenario(config, long_context=entry.category == "long_context")
            except Exception as error:
                raise EnvironmentBroken(f"bfcl {entry.id}: {api} does not load: {error!r}") from error
        return thing

    def call(self, call: Call) -> str:
        """Carry out one call. Whatever goes wrong inside is an observation, as in the benchmark."""
        method = self._methods.get(call.name)
        if method is None:
            return _error(f"there is no tool called {call.name!r}")
        try:
            _refuse_endless_work(call.named if not call.positional else self.bind(call).named)
            result = method(*copy.deepcopy(call.positional), **copy.deepcopy(dict(call.named)))
        except Exception as error:  # the API classes raise whatever they like on wrong arguments
            return _error(str(error) or type(error).__name__)
        return _text(result)

    def bind(self, call: Call) -> Call:
        """The same call with every argument named.

        Raises:
            KeyError: no such tool. TypeError: the arguments do not fit it.
        """
        bound = inspect.signature(self._methods[call.name]).bind(*call.positional, **call.named)
        return Call(call.name, dict(bound.arguments))

    def state(self) -> dict[str, dict[str, Any]]:
        """The public attributes of every object, live (not a copy): what the verifier compares."""
        return {api: {k: v for k, v in vars(o).items() if k[0] != "_"} for api, o in self._objects.items()}


def differing(one: World, other: World) -> list[str]:
    """`Class.attribute` names at which two worlds of one entry differ."""
    names = []
    theirs = other.state()
    for api, attributes in one.state().items():
        for name, value in attributes.items():
            try:
                same = bool(value == theirs[api].get(name))
            except RecursionError:  # a folder moved into itself
                same = False
            if not same:
                names.append(f"{api}.{name}")
    return names


def _refuse_endless_work(arguments: Mapping[str, Any]) -> None:
    for name in WORK & set(arguments):
        if isinstance(arguments[name], (int, float)) and abs(arguments[name]) > MAX_MAGNITUDE:
            raise ValueError(f"{name} must be at most {MAX_MAGNITUDE}")


def _error(text: str) -> str:
    return json.dumps({"error": text})


def _text(result: Any) -> str:
    if isinstance(result, str):
        return result
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except (TypeError, ValueError, RecursionError):
            pass
    try:
        return str(result)
    except RecursionError:
        return _error("the result is endless")
