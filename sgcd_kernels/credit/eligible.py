"""Reductions over the eligible tokens of each packed sequence: whole-batch operations that never wait for a GPU."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from sgcd_kernels.backends.protocol import Backend, CreditTokens


class EligibleTokens:
    """Packed tokens, their sequences, and which of them may carry credit."""

    def __init__(
        self,
        cu_seqlens: Tensor,  # [B + 1] int64
        eligible: Tensor,  # [N] bool
        turns: Tensor | None = None,  # [N] int64
    ) -> None:
        self.cu_seqlens, self.eligible, self.turns = cu_seqlens, eligible, turns
        self.lengths = cu_seqlens.diff()  # [B]
        numbers = torch.arange(self.lengths.numel(), device=cu_seqlens.device)
        self.sequence = numbers.repeat_interleave(self.lengths, output_size=eligible.numel())  # [N]
        eligible_before = torch.nn.functional.pad(eligible.cumsum(0), (1, 0))
        self.eligible_before_token = eligible_before[:-1]  # [N]
        self.eligible_before_sequence = eligible_before[cu_seqlens[:-1]]  # [B]
        self.counts = eligible_before[cu_seqlens[1:]] - self.eligible_before_sequence  # [B], eligible tokens

    @cached_property
    def for_backend(self) -> CreditTokens:
        return CreditTokens(self.eligible, self.cu_seqlens, self.turns)

    def spread(self, x: Tensor) -> Tensor:  # [B] -> [N]
        return x.index_select(0, self.sequence)

    def maximum(self, x: Tensor) -> Tensor:  # [N] -> [B]
        return self._reduce(x.masked_fill(~self.eligible, -torch.inf), "max")

    def total(self, x: Tensor) -> Tensor:  # [N] -> [B] fp64
        return self._reduce(x.double().masked_fill(~self.eligible, 0.0), "sum")

    def mean(self, x: Tensor) -> Tensor:  # [N] -> [B], rounded once
        return (self.total(x) / self.counts.clamp(min=1)).to(x.dtype)

    def by_turn(self, turns: Tensor) -> tuple[Tensor, EligibleTokens]:  # [N] int64
        """(an order of the tokens that makes the eligible ones of each turn contiguous, the turns as sequences)

        A turn is all tokens of a sequence with the same id, contiguous or not. There are N turns, the last ones empty.
        """
        by_id = turns.sort(stable=True).indices
        order = by_id[self._by_sequence(by_id)]
        sequence, turn = self.sequence[order], turns[order]
        begins = torch.ones_like(self.eligible)
        begins[1:] = (sequence.diff() != 0) | (turn.diff() != 0) | self.eligible[order].diff()
        numbers = torch.arange(order.numel() + 1, device=order.device)
        return order, EligibleTokens(torch.searchsorted(begins.cumsum(0), numbers + 1), self.eligible[order])

    def quantile(self, x: Tensor, q: float, backend: Backend) -> Tensor:  # [N] -> [B]
        """`torch.quantile` of each sequence, bit for bit; any number where no token is eligible."""
        place = torch.full((), q, dtype=x.dtype, device=x.device) * (self.counts - 1).clamp(min=0).to(x.dtype)
        low, high = place.long(), place.ceil().long()
        values = backend.order_statistics(x, self.for_backend, low, high)
        return torch.lerp(values[0], values[1], place - low)

    def shuffle(self, seed: int) -> tuple[Tensor, Tensor]:
        """(to, from): token to[i] gets the value of token from[i], which shuffles each sequence's eligible tokens.

        The order depends only on the seed, the sequence's place in the batch and its number of eligible tokens.
        """
        start = _mix(torch.arange(self.lengths.numel(), device=self.lengths.device) + _signed(seed * _STEP))
        rank = self.eligible_before_token - self.spread(self.eligible_before_sequence)  # within its sequence
        draw = _mix(self.spread(start) + rank * _signed(_STEP))
        in_place, drawn = torch.arange(draw.numel(), device=draw.device), draw.sort(stable=True).indices
        return self._by_sequence(in_place), drawn[self._by_sequence(drawn)]

    def _by_sequence(self, tokens: Tensor) -> Tensor:
        """A stable order that groups `tokens` by sequence; ineligible ones come last."""
        group = self.sequence.masked_fill(~self.eligible, self.lengths.numel()).index_select(0, tokens)
        return group.sort(stable=True).indices

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        # Not index_add: on CUDA its order of summation, and so its last bit, varies from run to run.
        return torch.segment_reduce(x, how, lengths=self.lengths, unsafe=True)


_STEP = 0x9E3779B97F4A7C15


def _signed(x: int) -> int:
    """The int64 with the same low 64 bits."""
    return (x + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:  # int64, wraps around
    """SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014): every bit out depends on every bit in."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)
