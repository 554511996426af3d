"""QuACK's chunked linear cross-entropy (CuTe-DSL; Hopper and newer)."""

from __future__ import annotations

from bench.inputs import IGNORED, Inputs
from bench.providers import Outputs, needs, provides

PACKAGE = "quack-kernels"


@provides("cross_entropy", "quack", package=PACKAGE, refuses=needs("quack", gpu=True))
def cross_entropy(i: Inputs, mode: str) -> Outputs:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return {"loss": chunked_linear_cross_entropy(i.hidden, i.weight, i.targets, ignore_index=IGNORED)}
