"""The span scan of `sgcd_kernels.spans` on a GPU: sequences side by side, the tokens of one in order.

Comparisons are made in fp64, as the scan in Python makes them: both find the same spans.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgcd_kernels.credit_config import CreditConfig


def find_spans(
    u: Tensor,  # [N]
    entropy: Tensor,  # [N]
    turns: Tensor | None,  # [N] int64
    eligible: Tensor,  # [N] bool
    cu_seqlens: Tensor,  # [B + 1] int64
    config: CreditConfig,
) -> Tensor:  # [N] int64
    """The onset of the span that each token lies in, or -1."""
    onset = torch.full(u.shape, -1, dtype=torch.long, device=u.device)
    sequences = cu_seqlens.numel() - 1
    if sequences and u.numel():
        scan_kernel[(sequences,)](
            u.contiguous(), entropy.contiguous(), None if turns is None else turns.contiguous(),
            eligible.to(torch.uint8), cu_seqlens.to(u.device), onset,
            START=config.start, RESET=config.reset, PATIENCE=config.patience,
            RATIO=config.entropy_ratio, MARGIN=config.entropy_margin, num_warps=1,
        )  # fmt: skip
    return onset


@triton.jit
def scan_kernel(
    u, entropy, turns, eligible, cu_seqlens, onsets,
    START: tl.constexpr, RESET: tl.constexpr, PATIENCE: tl.constexpr, RATIO: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    """One sequence a program. The rules are those of `sgcd_kernels.spans`."""
    sequence = tl.program_id(0)
    onset = tl.full((), -1, tl.int64)
    span_turn = tl.full((), 0, tl.int64)
    quiet = tl.full((), 0, tl.int32)
    ceiling = tl.full((), 0.0, tl.float64)
    for t in range(tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)):
        live = tl.load(eligible + t) != 0
        d, h = tl.load(u + t).to(tl.float64), tl.load(entropy + t).to(tl.float64)
        turn = span_turn
        if turns is not None:
            turn = tl.load(turns + t)
        hushed = tl.where(d < RESET, quiet + 1, 0)
        stays = (onset >= 0) & ((h > ceiling) == 0) & (turn == span_turn) & (hushed < PATIENCE)
        starts = (stays == 0) & (d > START)
        ceiling = tl.where(live & starts, tl.maximum(h * RATIO, h + MARGIN), ceiling)
        span_turn = tl.where(live & starts, turn, span_turn)
        quiet = tl.where(live, tl.where(stays, hushed, 0), quiet)
        onset = tl.where(live, tl.where(starts, t, tl.where(stays, onset, -1)), onset)
        tl.store(onsets + t, tl.where(live, onset, -1))
