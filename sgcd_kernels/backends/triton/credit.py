"""The span scan on a GPU: sequences side by side, the tokens of one in order. Thresholds are compared in fp64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgcd_kernels.backends.protocol import CreditTokens, SpanLimits
from sgcd_kernels.backends.torch.credit import order_statistics

__all__ = ["find_spans", "order_statistics"]


def find_spans(u: Tensor, entropy: Tensor, tokens: CreditTokens, limits: SpanLimits) -> Tensor:
    onset = torch.full(u.shape, -1, dtype=torch.long, device=u.device)
    sequences = tokens.cu_seqlens.numel() - 1
    if sequences and u.numel():
        scan_kernel[(sequences,)](
            u.contiguous(), entropy.contiguous(), None if tokens.turns is None else tokens.turns.contiguous(),
            tokens.eligible.to(torch.uint8), tokens.cu_seqlens.to(u.device), onset,
            START=limits.start, RESET=limits.reset, PATIENCE=limits.patience,
            RATIO=limits.entropy_ratio, MARGIN=limits.entropy_margin, num_warps=1,
        )  # fmt: skip
    return onset


@triton.jit
def scan_kernel(
    u, entropy, turns, eligible, cu_seqlens, onsets,
    START: tl.constexpr, RESET: tl.constexpr, PATIENCE: tl.constexpr, RATIO: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    """One sequence per program, by the rules of `protocol.Backend.find_spans`."""
    sequence = tl.program_id(0)
    onset = tl.full((), -1, tl.int64)
    onset_turn = tl.full((), 0, tl.int64)
    quiet = tl.full((), 0, tl.int32)
    ceiling = tl.full((), 0.0, tl.float64)
    for t in range(tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)):
        counts = tl.load(eligible + t) != 0
        spike, h = tl.load(u + t).to(tl.float64), tl.load(entropy + t).to(tl.float64)
        turn = onset_turn
        if turns is not None:
            turn = tl.load(turns + t)
        new_quiet = tl.where(spike < RESET, quiet + 1, 0)
        stays = (onset >= 0) & ((h > ceiling) == 0) & (turn == onset_turn) & (new_quiet < PATIENCE)
        starts = (stays == 0) & (spike > START)
        ceiling = tl.where(counts & starts, tl.maximum(h * RATIO, h + MARGIN), ceiling)
        onset_turn = tl.where(counts & starts, turn, onset_turn)
        quiet = tl.where(counts, tl.where(stays, new_quiet, 0), quiet)
        onset = tl.where(counts, tl.where(starts, t, tl.where(stays, onset, -1)), onset)
        tl.store(onsets + t, tl.where(counts, onset, -1))
