"""What the server of trial processes imports once, so that a child starts in milliseconds. It must start no thread."""

from __future__ import annotations

import contextlib
import importlib

from bench import memory, registry

HEAVY = (
    "torch._dynamo",
    "sgcd_kernels.reference",
    "trl.kernels.chunked_divergence",
    "liger_kernel.chunked_loss",
    "cut_cross_entropy",
)

assert memory
registry.load()
for module in HEAVY:
    with contextlib.suppress(Exception):  # whoever is not installed, or fails, says so when it is called
        importlib.import_module(module)
