"""When the Triton kernels can run, and why not where they cannot. Does not import Triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from sgcd_kernels.types import Projection

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MINIMUM_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton was told to run its kernels in Python, on CPU tensors: slow, for tests and debugging."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def unavailable_reason() -> str | None:
    """Why no kernel can run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` installs it where it has a wheel (Linux)"
    if torch.version.hip is not None and not interpreting():
        return "its kernels are written and checked for NVIDIA's GPUs, and this PyTorch is built for AMD's (ROCm)"
    if not torch.cuda.is_available() and not interpreting():
        return "PyTorch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels in Python, to test them)"
    return None


def refuses(op: str, p: Projection) -> str | None:
    """Why these inputs are for another backend, or None."""
    device = p.hidden.device
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return f"it needs compute capability 8.0 or newer and {device} has {capability[0]}.{capability[1]}"
    elif device.type != "cpu" or not interpreting():
        return f"it runs on CUDA tensors and hidden is on {device}"
    for name, x in (("hidden", p.hidden), ("weight", p.weight)):
        if x.dtype not in DTYPES:
            return f"it takes float16, bfloat16 and float32 and {name} is {x.dtype}"
    if p.weight.shape[1] > 1 and p.weight.stride(1) != 1:
        return f"it reads rows of weight as they lie and its strides are {p.weight.stride()}"
    if p.weight.shape[1] == 0 or p.weight.shape[0] >= (1 << 31) - 1024 or p.num_rows >= (1 << 31) - 1024:
        return f"hidden {list(p.hidden.shape)} and weight {list(p.weight.shape)} are beyond what it indexes"
    return None
