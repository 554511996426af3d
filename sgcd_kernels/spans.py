"""High-credit spans: where they start, what ends them. The one sequential part of the credit rules.

A span's end depends on its onset, so each sequence is read from left to right: by the C++ operator on CPU tensors, by
a Triton kernel on CUDA tensors (on their copies where there is no Triton), and by the loop below where there is no
extension either, at about 0.5 microseconds a token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sgcd_kernels.cpp import extension
from sgcd_kernels.credit_config import CreditConfig
from sgcd_kernels.triton import availability


def find_spans(
    u: Tensor,  # [N], normalised divergence, fp32 or fp64
    entropy: Tensor,  # [N], the teacher's, the same dtype
    turns: Tensor | None,  # [N] int64
    eligible: Tensor,  # [N] bool
    cu_seqlens: Tensor,  # [B + 1] int64, from 0 to N
    config: CreditConfig,
) -> Tensor:  # [N] int64
    """The packed index of the onset of the span that a token lies in, or -1 outside spans.

    A span starts at a token with u > start. It ends before the first token whose teacher entropy is above
    max(entropy_ratio H_onset, H_onset + entropy_margin), before the token that completes `patience` quiet ones
    (u < reset) in a row, and where the turn or the sequence ends. The token that ends a span may start the next.
    Ineligible tokens are skipped: they end no span and get -1. Thresholds are compared in fp64.
    """
    if u.is_cuda and availability.unavailable_reason() is None:
        # Imported here: triton is no dependency of the package.
        scan: Callable[..., Tensor] = importlib.import_module("sgcd_kernels.triton.spans").find_spans
        return scan(u, entropy, turns, eligible, cu_seqlens, config)
    scan = find_spans_in_python if extension.unavailable_reason() else find_spans_in_cpp
    host_turns = None if turns is None else turns.cpu()
    return scan(u.cpu(), entropy.cpu(), host_turns, eligible.cpu(), cu_seqlens.cpu(), config).to(u.device)


def find_spans_in_cpp(
    u: Tensor, entropy: Tensor, turns: Tensor | None, eligible: Tensor, cu_seqlens: Tensor, config: CreditConfig
) -> Tensor:
    limits = (config.start, config.reset, config.patience, config.entropy_ratio, config.entropy_margin)
    onsets: Tensor = torch.ops.sgcd_kernels.find_spans(u, entropy, turns, eligible, cu_seqlens, *limits)
    return onsets


def find_spans_in_python(
    u: Tensor, entropy: Tensor, turns: Tensor | None, eligible: Tensor, cu_seqlens: Tensor, config: CreditConfig
) -> Tensor:
    """The same, token by token: what the operators are tested against."""
    turn_of = [0] * u.numel() if turns is None else turns.tolist()
    tokens = list(zip(u.tolist(), entropy.tolist(), turn_of, eligible.tolist(), strict=True))
    out = [-1] * u.numel()
    for first, stop in pairwise(cu_seqlens.tolist()):
        onset, onset_turn, ceiling, quiet = -1, 0, 0.0, 0
        for t in range(first, stop):
            spike, h, turn, counts = tokens[t]
            if not counts:
                continue
            if onset >= 0:
                quiet = quiet + 1 if spike < config.reset else 0
                if h > ceiling or turn != onset_turn or quiet == config.patience:
                    onset = -1
            if onset < 0 and spike > config.start:
                onset, onset_turn, quiet = t, turn, 0
                ceiling = max(config.entropy_ratio * h, h + config.entropy_margin)
            out[t] = onset
    return torch.tensor(out, dtype=torch.long)
