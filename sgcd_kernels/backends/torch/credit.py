"""The sequential and sorted parts of the credit rules in plain PyTorch and Python; compiled code is tested against it.

A span's end depends on its onset, so the scan reads each sequence from left to right, at about 0.5 microseconds per
token.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sgcd_kernels.backends.protocol import CreditTokens, SpanLimits


def find_spans(u: Tensor, entropy: Tensor, tokens: CreditTokens, limits: SpanLimits) -> Tensor:
    turns = [0] * u.numel() if tokens.turns is None else tokens.turns.tolist()
    rows = list(zip(u.tolist(), entropy.tolist(), turns, tokens.eligible.tolist(), strict=True))
    out = [-1] * u.numel()
    for first, stop in pairwise(tokens.cu_seqlens.tolist()):
        onset, onset_turn, ceiling, quiet = -1, 0, 0.0, 0
        for t in range(first, stop):
            spike, h, turn, eligible = rows[t]
            if not eligible:
                continue
            if onset >= 0:
                quiet = quiet + 1 if spike < limits.reset else 0
                if h > ceiling or turn != onset_turn or quiet == limits.patience:
                    onset = -1
            if onset < 0 and spike > limits.start:
                onset, onset_turn, quiet = t, turn, 0
                ceiling = max(limits.entropy_ratio * h, h + limits.entropy_margin)
            out[t] = onset
    return torch.tensor(out, dtype=torch.long, device=u.device)


def order_statistics(x: Tensor, tokens: CreditTokens, low: Tensor, high: Tensor) -> Tensor:  # [2, B]
    lengths = tokens.cu_seqlens.diff()
    numbers = torch.arange(lengths.numel(), device=x.device)
    sequence = numbers.repeat_interleave(lengths, output_size=x.numel())
    eligible_before = torch.nn.functional.pad(tokens.eligible.cumsum(0), (1, 0))[tokens.cu_seqlens[:-1]]
    by_value, at = x.sort()  # equal values may come in any order
    by_sequence = sequence.masked_fill(~tokens.eligible, lengths.numel()).index_select(0, at).sort(stable=True).indices
    places = (eligible_before + torch.stack((low, high))).clamp(max=x.numel() - 1)
    return by_value.index_select(0, by_sequence)[places]
