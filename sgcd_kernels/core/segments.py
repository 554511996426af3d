"""Which sequence each token belongs to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sgcd_kernels.core.validation import cu_seqlens_values


@dataclass(frozen=True)
class Segments:
    """The sequences of packed tokens, or of a subset of them (`gather`)."""

    ids: Tensor  # [n] int64, rising: the number of a token's sequence
    count: int
    longest: int  # tokens, masked ones too

    @staticmethod
    def of(leading: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> Segments:
        """The rows of [B, T], or the ranges of `cu_seqlens`, or all tokens as one sequence."""
        tokens = leading.numel()
        if len(leading) == 2:
            ids = torch.arange(leading[0], device=device).repeat_interleave(leading[1], output_size=tokens)
            return Segments(ids, leading[0], leading[1])
        if cu_seqlens is None:
            return Segments(torch.zeros(tokens, dtype=torch.long, device=device), 1, tokens)
        lengths = cu_seqlens_values(cu_seqlens, tokens).diff()
        longest = int(lengths.max()) if lengths.numel() else 0
        lengths = lengths.to(device)
        ids = torch.arange(lengths.numel(), device=device).repeat_interleave(lengths, output_size=tokens)
        return Segments(ids, lengths.numel(), longest)

    def gather(self, rows: Tensor | None) -> Segments:
        return self if rows is None else replace(self, ids=self.ids.index_select(0, rows))

    def per_token(self, values: Tensor, leading: torch.Size) -> Tensor:  # [N]
        """One value per token, given values per token (of shape `leading`) or per sequence."""
        return values.reshape(-1) if values.shape == leading else values[self.ids]

    def mean(self, x: Tensor) -> Tensor:  # [n] -> [count]
        """The mean of each sequence; 0 for an empty one."""
        # Not bincount: it waits for the GPU to learn how long its result is.
        tokens = torch.searchsorted(self.ids, torch.arange(self.count + 1, device=self.ids.device)).diff()
        # Not index_add: on CUDA its order of summation, and so its last bit, varies from run to run.
        return torch.segment_reduce(x, "sum", lengths=tokens, unsafe=True) / tokens.clamp(min=1)


def runs_of(loss_tokens: Tensor) -> Tensor:  # [N] bool -> [N]
    """A number for each run of consecutive loss tokens: the turns, if no `turn_ids` are given.

    Runs that touch at a boundary of sequences may have the same number; no rule looks across sequences.
    """
    return (loss_tokens & ~loss_tokens.roll(1)).cumsum(0)
