"""Who implements what: `@provides("op", "name")` on a function of the inputs that returns the op's values.

A provider returns tensors by the names that `bench.truth.Truth.expected` uses. For the modes with a backward pass it is
called on inputs whose hidden and weight are leaves, and the suite runs the backward pass itself. Packages are imported
inside the functions, so that one that is missing costs its own rows only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bench.cases import OPS, Case
from bench.errors import UserError
from bench.inputs import Inputs

Outputs = Mapping[str, Tensor]
MODULES = ("ours", "floor", "eager", "compiled", "liger", "cce", "trl", "verl", "quack", "composed")


@dataclass(frozen=True)
class Provider:
    """One implementation of one op."""

    op: str
    name: str
    run: Callable[[Inputs, str], Outputs]  # (inputs, mode)
    refuses: Callable[[Case], str | None]  # why it cannot run a case, in a few words
    package: str  # whose version goes into the row
    bare: bool = False  # products alone: nothing to check, nothing to differentiate
    compiles: bool = False  # for the shapes of its first call


_PROVIDERS: dict[tuple[str, str], Provider] = {}


def never(case: Case) -> str | None:
    return None


def provides(
    op: str,
    name: str,
    *,
    package: str = "torch",
    refuses: Callable[[Case], str | None] = never,
    bare: bool = False,
    compiles: bool = False,
) -> Callable[[Callable[[Inputs, str], Outputs]], Callable[[Inputs, str], Outputs]]:
    """Register a function as the provider `name` of `op`. The last registration of a name wins."""
    assert op in OPS, op

    def register(run: Callable[[Inputs, str], Outputs]) -> Callable[[Inputs, str], Outputs]:
        _PROVIDERS[op, name] = Provider(op, name, run, refuses, package, bare, compiles)
        return run

    return register


def load(files: tuple[Path, ...] = ()) -> None:
    """Import the suite's providers, and Python files that register further ones."""
    for module in MODULES:
        importlib.import_module(f"bench.providers.{module}")
    for file in files:
        spec = importlib.util.spec_from_file_location(f"bench_with_{file.stem}", file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise UserError(f"--with: {file} is not a Python file")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def of(op: str) -> list[Provider]:
    """The providers of `op`, in the order of their registration."""
    return [p for (o, _), p in _PROVIDERS.items() if o == op]


def names() -> list[str]:
    return list(dict.fromkeys(name for _, name in _PROVIDERS))


def needs(package: str, *, gpu: bool = False) -> Callable[[Case], str | None]:
    """Refuse where `package` (an import name) is not installed, or on a CPU if it has no code for one."""

    def refuses(case: Case) -> str | None:
        if importlib.util.find_spec(package) is None:
            return "not installed"
        return "needs a GPU" if gpu and case.device == "cpu" else None

    return refuses


@functools.cache
def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
