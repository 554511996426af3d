"""The credit of a batch as sums, which may be added over micro-batches and ranks before they become metrics."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sgcd_kernels.credit.rules import Credit


class CreditSums(NamedTuple):
    """Over eligible tokens; 0-dimensional."""

    tokens: Tensor  # eligible ones
    divergence: Tensor  # nats
    teacher_entropy: Tensor  # nats
    weights: Tensor
    salient: Tensor  # tokens with s > 0
    saturated: Tensor  # tokens with W at its ceiling
    spans: Tensor
    in_spans: Tensor  # tokens
    diverging: Tensor  # tokens with d != 0
    weighted: Tensor  # tokens with W != 1

    @property
    def inert(self) -> Tensor:
        """Every d is 0, or every W is 1, over at least one eligible token."""
        return (self.tokens > 0) & ((self.diverging == 0) | (self.weighted == 0))


def credit_sums(
    credit: Credit,
    divergence: Tensor,  # [N]
    teacher_entropy: Tensor,  # [N]
    eligible: Tensor,  # [N] bool
    clip: float,  # the ceiling of W
) -> CreditSums:
    """The sums of a batch. The host never waits for the GPU. Inputs may have any shape, the same for all."""
    weights, saliency, ids = credit
    in_spans = eligible & (ids >= 0)
    return CreditSums(
        tokens=eligible.sum(),
        divergence=_sum(divergence, eligible),
        teacher_entropy=_sum(teacher_entropy, eligible),
        weights=_sum(weights, eligible),
        salient=_sum((saliency > 0).float(), eligible),
        saturated=_sum((weights >= clip).float(), eligible),
        spans=_distinct(ids.reshape(-1), in_spans.reshape(-1)),
        in_spans=in_spans.sum(),
        diverging=((divergence != 0) & eligible).sum(),
        weighted=((weights != 1) & eligible).sum(),
    )


def credit_summary(sums: CreditSums) -> dict[str, Tensor]:
    """The metrics `credit/*` of a batch: means and fractions over its eligible tokens; W is 1 where there are none."""
    count = sums.tokens.clamp(min=1)
    values = {
        "credit/mean_divergence": sums.divergence / count,
        "credit/mean_weight": torch.where(sums.tokens > 0, sums.weights / count, 1.0),
        "credit/frac_salient": sums.salient / count,
        "credit/frac_saturated": sums.saturated / count,
        "credit/num_spans": sums.spans,
        "credit/mean_span_length": sums.in_spans / sums.spans.clamp(min=1),
        "credit/teacher_entropy": sums.teacher_entropy / count,
        "credit/inert": sums.inert,
    }
    return {name: value.to(sums.divergence.dtype) for name, value in values.items()}


def warn_if_inert(sums: CreditSums) -> None:
    """Issue a RuntimeWarning if credit was requested and had no effect. Waits for the GPU."""
    if bool(sums.inert):
        what = "all weights are 1" if sums.diverging else "all divergences are 0"
        meaning = "" if sums.weighted else ", so this is plain GRPO"
        message = f"credit is inert: {what} over {int(sums.tokens)} eligible tokens{meaning}"
        warnings.warn(message, RuntimeWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """The `stacklevel` of the line outside this package and PyTorch that led here."""
    inside = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(torch.__file__).parent))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*inside, "<eval_with_key>")):
        level, frame = level + 1, frame.f_back
    return level


def _sum(x: Tensor, over: Tensor) -> Tensor:
    # torch.where, not boolean indexing, for which the host would have to wait for the count.
    return torch.where(over, x, 0.0).sum()


def _distinct(ids: Tensor, over: Tensor) -> Tensor:
    """How many of the ids, indices of tokens, occur among the tokens `over`."""
    seen = ids.new_zeros(ids.numel() + 1).scatter_(0, torch.where(over, ids, ids.numel()), 1)
    return seen[:-1].sum()
