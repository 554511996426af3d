"""PyTorch's own chunked linear cross-entropy: `F.linear_cross_entropy` with its default chunking, since 2.13."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.inputs import IGNORED, Inputs
from bench.providers import Outputs, provides


def refuses(case: Case) -> str | None:
    return None if hasattr(torch.nn, "LinearCrossEntropyOptions") else "needs torch 2.13"


@provides("cross_entropy", "torch-linear-ce", refuses=refuses)
def cross_entropy(i: Inputs, mode: str) -> Outputs:
    options = torch.nn.LinearCrossEntropyOptions()
    return {"loss": F.linear_cross_entropy(i.hidden, i.weight, i.targets, ignore_index=IGNORED, options=options)}
