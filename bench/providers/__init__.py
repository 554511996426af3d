"""The implementations that are measured, one file per source, and how one of them is run.

`@provides("op", "name")` registers a function of the inputs that returns the op's values, by the names that
`bench.truth.Truth.expected` uses. For modes with a backward pass it is called on inputs whose hidden and weight are
leaves, and the suite runs the backward pass itself. Packages are imported inside the functions, so that a missing one
costs its own rows only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import OPS, Case, UserError
from bench.inputs import Inputs

Outputs = Mapping[str, Tensor]
MODULES = (
    "ours", "matmul", "eager", "compiled", "torch_linear_ce", "liger", "cce", "trl", "verl", "quack", "composed",
)  # fmt: skip


@dataclass(frozen=True)
class Provider:
    """One implementation of one op."""

    op: str
    name: str
    run: Callable[[Inputs, str], Outputs]  # (inputs, mode)
    refuses: Callable[[Case], str | None]  # why it cannot run a case, in a few words
    package: str  # whose version goes into the row
    bare: bool = False  # matrix products alone: nothing to check, nothing to differentiate
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


def providers_of(op: str) -> list[Provider]:
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


def run_forward(p: Provider, i: Inputs, mode: str) -> tuple[Inputs, Outputs]:
    """The provider's values, differentiable unless the mode is forward, and the inputs that they came from."""
    if mode == "forward" or p.bare:
        with torch.no_grad():
            return i, p.run(i, mode)
    i = i.leaves()
    return i, p.run(i, mode)


def run_backward(i: Inputs, outputs: Outputs) -> dict[str, Tensor]:
    """The gradients of hidden and weight."""
    if "loss" in outputs:
        outputs["loss"].backward()  # type: ignore[no-untyped-call]
    elif "logp" in outputs:
        logp = outputs["logp"]
        upstream = i.upstream if logp.numel() == i.upstream.numel() else i.upstream[i.rows]
        logp.backward(upstream.to(logp.dtype).view_as(logp))  # type: ignore[no-untyped-call]
    grads = {"d_hidden": i.hidden.grad, "d_weight": i.weight.grad}
    return {name: grad for name, grad in grads.items() if grad is not None}


def run_once(p: Provider, i: Inputs, mode: str) -> dict[str, Tensor]:
    """Values, and gradients in the modes that have them: what the correctness gate judges."""
    used, outputs = run_forward(p, i, mode)
    found = {name: value.detach() for name, value in outputs.items()}
    return found if mode == "forward" or p.bare else found | run_backward(used, outputs)


def prepare_run(p: Provider, copies: list[Inputs], mode: str) -> Callable[[int], Callable[[], object]]:
    """What the stopwatch prepares untimed and then runs: in mode backward it times that pass alone."""

    def prepare(k: int) -> Callable[[], object]:
        i = copies[k % len(copies)]
        if mode != "backward" or p.bare:
            return lambda: run_once(p, i, mode)
        return functools.partial(run_backward, *run_forward(p, i, mode))

    return prepare


def describe_failure(error: BaseException) -> str:
    """An exception as the status of a row: one line, the kind first."""
    text = " ".join(str(error).split())
    memory = "allocate memory" in text or "out of memory" in text.lower()
    if memory or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}"
    kind = type(error).__name__
    return f"threw {kind}: {text[:160]}" if text else f"threw {kind}"
