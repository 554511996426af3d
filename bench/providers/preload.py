"""Imported once by the server of trial processes, so that a child starts in milliseconds. It must start no thread."""

from __future__ import annotations

import contextlib
import importlib

from bench import providers

HEAVY = (
    "bench.memory",
    "torch._dynamo",
    "sgcd_kernels.reference",
    "trl.kernels.chunked_divergence",
    "liger_kernel.chunked_loss",
    "cut_cross_entropy",
)

providers.load()
for module in HEAVY:
    with contextlib.suppress(Exception):  # a package that is missing or broken says so when it is called
        importlib.import_module(module)
