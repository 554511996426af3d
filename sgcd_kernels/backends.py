"""Which implementation runs an op: the one place where `impl=` is read.

A backend is a module with one function an op (see `OPS`) on `Projection`s. To add one, give it an entry in `_BACKENDS`
whose `unavailable_reason` says in a sentence why it cannot run a given op on a given device and dtype, or None.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sgcd_kernels.cpp import extension
from sgcd_kernels.triton import availability
from sgcd_kernels.types import Projection
from sgcd_kernels.validation import check_choice

OPS = ("logprob_forward", "logprob_backward", "target_logp", "divergence_forward", "distill_backward")
# The last two over the ranks of a group; the former with features or top_k (without, every backend can).
SHARDED_OPS = ("sharded_divergence_forward", "sharded_distill_backward")


class BackendStatus(NamedTuple):
    """Whether a backend can run here; if not, why, and else which of its paths does."""

    usable: bool
    reason: str


@dataclass(frozen=True)
class Backend:
    """Where a backend lives and when it can be used."""

    module: str
    unavailable_reason: Callable[[], str | None]  # on this machine, whatever the inputs
    refuses: Callable[[str, Projection], str | None]  # (op, one head) on a machine where it is available
    auto_devices: tuple[str, ...]  # for whose tensors "auto" tries it
    description: Callable[[], str] = lambda: "usable"  # what backend_status says where it is available


def _cpp_refuses(op: str, p: Projection) -> str | None:
    return "it has none for vocab-sharded heads" if op in SHARDED_OPS else extension.refuses(op, p)


# In the order in which "auto" tries them.
_BACKENDS: dict[str, Backend] = {
    "triton": Backend("sgcd_kernels.triton.ops", availability.unavailable_reason, availability.refuses, ("cuda",)),
    "cpp": Backend("sgcd_kernels.cpp.ops", extension.unavailable_reason, _cpp_refuses, ("cpu",), extension.description),
    "torch": Backend("sgcd_kernels.torch_backend", lambda: None, lambda op, inputs: None, ("cpu", "cuda")),
}
IMPLS = ("auto", *_BACKENDS)


def backend_status() -> dict[str, BackendStatus]:
    """Say which backends are usable on this machine and, for each that is not, why.

    >>> status = backend_status()
    >>> sorted(status), status["torch"].usable, all(s.reason for s in status.values())
    (['cpp', 'torch', 'triton'], True, True)
    """
    reasons = {name: backend.unavailable_reason() for name, backend in _BACKENDS.items()}
    return {
        name: BackendStatus(reason is None, reason or _BACKENDS[name].description()) for name, reason in reasons.items()
    }


def resolve(op: str, impl: str, *heads: Projection) -> Callable[..., Any]:
    """The function that runs `op` on these heads. Asking for a backend that cannot is a ValueError that says why."""
    assert op in OPS + SHARDED_OPS, op
    check_choice("impl", impl, IMPLS)
    if impl != "auto":
        reason = _reason(impl, op, heads)
        if reason is not None:
            raise ValueError(f"impl is {impl!r}, which cannot run {op} here: {reason}; needs another, or 'auto'")
        return _function(impl, op)
    device = heads[0].hidden.device.type
    fitting = (name for name, backend in _BACKENDS.items() if device in backend.auto_devices)
    return _function(next((name for name in fitting if _reason(name, op, heads) is None), "torch"), op)


def _reason(name: str, op: str, heads: tuple[Projection, ...]) -> str | None:
    backend = _BACKENDS[name]
    refusals = (backend.refuses(op, head) for head in heads)
    return backend.unavailable_reason() or next((reason for reason in refusals if reason is not None), None)


def _function(name: str, op: str) -> Callable[..., Any]:
    module = importlib.import_module(_BACKENDS[name].module)
    function: Callable[..., Any] = getattr(module, op.removeprefix("sharded_"))
    return function


def no_autocast(device: torch.device) -> torch.autocast:
    """Autocast would round the logits to half precision behind our back."""
    return torch.autocast(device.type, enabled=False)
