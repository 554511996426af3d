"""One run of one provider in one mode, and what its failure is called."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.inputs import Inputs
from bench.registry import Outputs, Provider


def forward(p: Provider, i: Inputs, mode: str) -> tuple[Inputs, Outputs]:
    """The provider's values; differentiable ones unless the mode is forward. The inputs that they came from."""
    if mode == "forward" or p.bare:
        with torch.no_grad():
            return i, p.run(i, mode)
    i = i.leaves()
    return i, p.run(i, mode)


def backward(i: Inputs, outputs: Outputs) -> dict[str, Tensor]:
    """The gradients of hidden and weight."""
    if "loss" in outputs:
        outputs["loss"].backward()  # type: ignore[no-untyped-call]
    elif "logp" in outputs:
        logp = outputs["logp"]
        upstream = i.upstream if logp.numel() == i.upstream.numel() else i.upstream[i.rows]
        logp.backward(upstream.to(logp.dtype).view_as(logp))  # type: ignore[no-untyped-call]
    grads = {"d_hidden": i.hidden.grad, "d_weight": i.weight.grad}
    return {name: grad for name, grad in grads.items() if grad is not None}


def once(p: Provider, i: Inputs, mode: str) -> dict[str, Tensor]:
    """Values, and gradients in the modes that have them: what the gate judges."""
    used, outputs = forward(p, i, mode)
    found = {name: value.detach() for name, value in outputs.items()}
    return found if mode == "forward" or p.bare else found | backward(used, outputs)


def prepare(p: Provider, copies: list[Inputs], mode: str) -> Callable[[int], Callable[[], object]]:
    """What the stopwatch prepares and runs: of mode backward it times that pass alone."""

    def run(k: int) -> Callable[[], object]:
        i = copies[k % len(copies)]
        if mode != "backward" or p.bare:
            return lambda: once(p, i, mode)
        return functools.partial(backward, *forward(p, i, mode))

    return run


def name_failure(error: BaseException) -> str:
    """A row's words for an exception: one line, the kind first."""
    text = " ".join(str(error).split())
    memory = "allocate memory" in text or "out of memory" in text.lower()
    if memory or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}"
    kind = type(error).__name__
    return f"threw {kind}: {text[:160]}" if text else f"threw {kind}"
