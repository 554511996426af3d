"""Chooses the backend of a call: the only place where `impl=` is read.

To add a backend, write the functions of `protocol.Backend` in the four files of a new folder, and add an entry to
`_BACKENDS`. The entry's functions return the reason, as a sentence, why the backend cannot run on this machine or on
given inputs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sgcd_kernels.backends.cpp import extension
from sgcd_kernels.backends.protocol import IMPLS, Backend
from sgcd_kernels.core.lm_head import Projection
from sgcd_kernels.core.validation import check_choice

# In which file of a backend's folder each function of the protocol is defined.
_FILES = {
    "logprob_forward": "logprob",
    "logprob_backward": "logprob",
    "divergence_forward": "divergence",
    "distill_backward": "distill",
    "find_spans": "credit",
    "order_statistics": "credit",
}
# Functions for which every backend uses the torch one. target_logp, one dot product per row, needs no kernel.
_EVERYWHERE = {"target_logp": "sgcd_kernels.backends.torch.logprob"}
HALVES_AND_FLOAT = (torch.float16, torch.bfloat16, torch.float32)


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine; `reason` says why not, or which code path it uses."""

    usable: bool
    reason: str


@dataclass(frozen=True)
class _Entry:
    unavailable_reason: Callable[[], str | None]  # why it cannot run on this machine, whatever the inputs
    refuses: Callable[[str, Projection], str | None]  # (function, input) -> why it cannot run on that input
    auto_devices: tuple[str, ...]  # "auto" tries it for tensors on these devices
    description: Callable[[], str] = lambda: "usable"  # for backend_status, if available


class _Folder:
    """A backend whose files are imported on first use of one of their functions."""

    def __init__(self, name: str) -> None:
        self.package = f"{__package__}.{name}"

    def __getattr__(self, function: str) -> Any:
        file = _EVERYWHERE.get(function) or f"{self.package}.{_FILES[function]}"
        found = getattr(importlib.import_module(file), function)
        setattr(self, function, found)
        return found


def backend_status() -> dict[str, BackendStatus]:
    """Which backends are usable on this machine, and why the others are not.

    >>> status = backend_status()
    >>> sorted(status), status["torch"].usable, all(s.reason for s in status.values())
    (['cpp', 'torch', 'triton'], True, True)
    """
    reasons = {name: entry.unavailable_reason() for name, entry in _BACKENDS.items()}
    return {
        name: BackendStatus(reason is None, reason or _BACKENDS[name].description()) for name, reason in reasons.items()
    }


def backend_for(impl: str, function: str, *inputs: Projection) -> Backend:
    """The backend that runs `function` on these inputs. ValueError, with the reason, if `impl` names one that cannot.

    "divergence_second_pass" stands for a `divergence_forward` with features or top_k.
    """
    check_choice("impl", impl, IMPLS)
    if impl == "auto":
        device = inputs[0].hidden.device.type
        fitting = (name for name, entry in _BACKENDS.items() if device in entry.auto_devices)
        return _FOLDERS[next((name for name in fitting if _reason(name, function, inputs) is None), "torch")]
    reason = _reason(impl, function, inputs)
    if reason is not None:
        raise ValueError(f"impl is {impl!r}, which cannot run {function} here: {reason}; needs another, or 'auto'")
    return _FOLDERS[impl]


def credit_backend(impl: str, values: Tensor) -> Backend:
    """The backend for the scans and sorts of the credit rules over these per-token values.

    The C++ scan takes tensors on any device: it copies them to the host.
    """
    check_choice("impl", impl, IMPLS)
    reasons = {
        "triton": triton_unavailable_reason() or _triton_refuses_device("divergence", values),
        "cpp": extension.unavailable_reason(),
        "torch": None,
    }
    if impl == "auto":
        order = ("triton", "cpp", "torch") if values.is_cuda else ("cpp", "torch")
        return _FOLDERS[next(name for name in order if reasons[name] is None)]
    if reasons[impl] is not None:
        raise ValueError(
            f"impl is {impl!r}, which cannot run credit rules here: {reasons[impl]}; needs another, or 'auto'"
        )
    return _FOLDERS[impl]


def _reason(name: str, function: str, inputs: tuple[Projection, ...]) -> str | None:
    entry = _BACKENDS[name]
    refusals = (entry.refuses(function, x) for x in inputs)
    return entry.unavailable_reason() or next((reason for reason in refusals if reason is not None), None)


def interpreting() -> bool:
    """Whether TRITON_INTERPRET is set: Triton then runs kernels in Python, on CPU tensors, for tests and debugging."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def triton_unavailable_reason() -> str | None:
    """Why no Triton kernel can run on this machine, or None. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` installs it where it has a wheel (Linux)"
    if torch.version.hip is not None and not interpreting():
        return "its kernels are written and checked for NVIDIA's GPUs, and this PyTorch is built for AMD's (ROCm)"
    if not torch.cuda.is_available() and not interpreting():
        return "PyTorch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels in Python, to test them)"
    return None


def _triton_refuses_device(name: str, x: Tensor) -> str | None:
    if x.device.type == "cuda":
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or newer and {x.device} has {capability[0]}.{capability[1]}"
    elif x.device.type != "cpu" or not interpreting():
        return f"it runs on CUDA tensors and {name} is on {x.device}"
    return None


def _triton_refuses(function: str, x: Projection) -> str | None:
    hidden, weight = x.hidden, x.head.weight
    if (reason := _triton_refuses_device("hidden", hidden)) is not None:
        return reason
    for name, value in (("hidden", hidden), ("weight", weight)):
        if value.dtype not in HALVES_AND_FLOAT:
            return f"it takes float16, bfloat16 and float32 and {name} is {value.dtype}"
    if weight.shape[1] == 0 or weight.shape[0] >= (1 << 31) - 1024 or x.num_rows >= (1 << 31) - 1024:
        return f"hidden {list(hidden.shape)} and weight {list(weight.shape)} are beyond what it indexes"
    return None


def _cpp_refuses(function: str, x: Projection) -> str | None:
    hidden, weight = x.hidden, x.head.weight
    if x.head.group is not None and function in ("divergence_second_pass", "distill_backward"):
        return "it has none for vocab-sharded heads"
    if hidden.device.type != "cpu":
        return f"it runs on CPU tensors and hidden is on {hidden.device}"
    for name, value in (("hidden", hidden), ("weight", weight)):
        if value.dtype not in HALVES_AND_FLOAT:
            return f"it takes float32, bfloat16 and float16 and {name} is {value.dtype}"
    if not 0 < weight.shape[1] < 1 << 20 or weight.shape[0] >= (1 << 31) - 65:
        return f"weight has shape {list(weight.shape)}, which is beyond what it indexes"
    return None


# In the order in which "auto" tries them.
_BACKENDS: dict[str, _Entry] = {
    "triton": _Entry(triton_unavailable_reason, _triton_refuses, ("cuda",)),
    "cpp": _Entry(extension.unavailable_reason, _cpp_refuses, ("cpu",), extension.description),
    "torch": _Entry(lambda: None, lambda function, x: None, ("cpu", "cuda")),
}
_FOLDERS = {name: cast(Backend, _Folder(name)) for name in _BACKENDS}


def no_autocast(device: torch.device) -> torch.autocast:
    """Disable autocast, which would round logits to half precision."""
    return torch.autocast(device.type, enabled=False)
