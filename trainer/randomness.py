"""The global sources of randomness, of Python, NumPy and torch: set, kept and put back in one place.

The trainer itself draws from generators of its own. The global ones belong to whatever runs beside it in the process:
environments, plug-ins, dropout.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch

SEED = "SGCD_SEED"  # in the environment of the processes that environments start


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch, here and in the processes that environments start from now on.

    A forked one has NumPy's and torch's state from here, and `random` seeded, which Python would seed from the system.
    Any other finds the seed in $SGCD_SEED; a Python takes $PYTHONHASHSEED, which fixes the order of its sets.
    """
    _seed_forked_processes()
    os.environ |= {SEED: str(seed), "PYTHONHASHSEED": str(seed)}
    _seed_here(seed)


@cache
def _seed_forked_processes() -> None:
    """Once: what is registered stays registered."""
    os.register_at_fork(after_in_child=lambda: random.seed(int(os.environ.get(SEED, "0"))))


def get_state() -> dict[str, Any]:
    """The state of the global generators, as types that `torch.load(weights_only=True)` reads."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - it is kept, not used
    return {
        "python": random.getstate(),
        "numpy": (str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_state(state: dict[str, Any]) -> None:
    """Put back what `get_state` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def separate(seed: int, generator: torch.Generator | None = None) -> Iterator[None]:
    """Draw from `seed` inside, the global generators and `generator` alike, and go on as before afterwards."""
    state, own = get_state(), generator.get_state() if generator is not None else None
    _seed_here(seed)
    if generator is not None:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        set_state(state)
        if generator is not None and own is not None:
            generator.set_state(own)


def _seed_here(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - others draw from it
    torch.manual_seed(seed)
