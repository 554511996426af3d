"""Which sequence a token belongs to, and what is given once a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.surrogate import Segments
from sgcd_kernels.validation import check_cu_seqlens, frozen


def segments_of(leading: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> Segments:
    """The sequences: rows of [B, T], or the ranges of `cu_seqlens`, or all tokens as one."""
    tokens = leading.numel()
    if len(leading) == 2:
        ids = torch.arange(leading[0], device=device).repeat_interleave(leading[1], output_size=tokens)
        return Segments(ids, leading[0], leading[1])
    if cu_seqlens is None:
        return Segments(torch.zeros(tokens, dtype=torch.long, device=device), 1, tokens)
    lengths = check_cu_seqlens(cu_seqlens, tokens).diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    lengths = lengths.to(device)
    ids = torch.arange(lengths.numel(), device=device).repeat_interleave(lengths, output_size=tokens)
    return Segments(ids, lengths.numel(), longest)


def spread(advantages: Tensor, segments: Segments, leading: torch.Size, dtype: torch.dtype) -> Tensor:  # [N]
    """One advantage a token, from one a token or one a sequence."""
    values = frozen(advantages).to(dtype=dtype, device=segments.ids.device)
    return values.reshape(-1) if values.shape == leading else values[segments.ids]
