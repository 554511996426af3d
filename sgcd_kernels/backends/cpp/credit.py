"""The span scan and the quantiles of the credit rules, by the operators of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.backends.protocol import CreditTokens, SpanLimits
from sgcd_kernels.backends.torch import credit as plain


def find_spans(u: Tensor, entropy: Tensor, tokens: CreditTokens, limits: SpanLimits) -> Tensor:
    """Tensors of another device are scanned on the host."""
    turns = None if tokens.turns is None else tokens.turns.cpu()
    inputs = u.cpu(), entropy.cpu(), turns, tokens.eligible.cpu(), tokens.cu_seqlens.cpu()
    bounds = limits.start, limits.reset, limits.patience, limits.entropy_ratio, limits.entropy_margin
    onsets: Tensor = torch.ops.sgcd_kernels.find_spans(*inputs, *bounds)
    return onsets.to(u.device)


def order_statistics(x: Tensor, tokens: CreditTokens, low: Tensor, high: Tensor) -> Tensor:  # [2, B]
    """Tensors of another device are sorted there."""
    if x.device.type != "cpu":
        return plain.order_statistics(x, tokens, low, high)
    values: Tensor = torch.ops.sgcd_kernels.order_statistics(x, tokens.eligible, tokens.cu_seqlens, low, high)
    return values
