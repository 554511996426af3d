"""From padded model outputs to the packed rows that the ops take: shifted by one, generated tokens only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgcd_kernels.core.validation import check_device, check_hidden, check_tensor


class PackedTokens(NamedTuple):
    """The generated tokens of a batch, sequence after sequence: what the ops take as they stand (`pack_tokens`)."""

    hidden: Tensor  # [N, H], the states that predict the targets
    targets: Tensor  # [N] int64, the generated ids
    cu_seqlens: Tensor  # [B + 1] int64: sequence b has the rows cu_seqlens[b] to cu_seqlens[b + 1]
    turn_ids: Tensor  # [N] int64: the number of a token's turn in its sequence; turns are runs of `generated`


def pack_tokens(
    hidden: Tensor,  # [B, T, H], the last hidden states of the whole sequences, prompts included
    input_ids: Tensor,  # [B, T] int, what the model read
    generated: Tensor,  # [B, T] bool, true at tokens that the policy generated
    *,
    like: PackedTokens | None = None,  # the student's, where these are the teacher's states
) -> PackedTokens:
    """Select the generated tokens of a batch, each with the hidden state that predicts it.

    The state at position t predicts the token at t + 1. A token generated at position t is therefore scored with the
    state at t - 1, and `hidden[generated]` would be off by one: a valid tensor, and a wrong loss.

    Padding may be on either side, and prompts of any length: only `generated` counts. Student and teacher have prompts
    of different lengths; `like=student` makes sure that they score the same tokens.

    Args:
        hidden: of any float dtype.
        input_ids: int; not read where `generated` is false.
        generated: bool or 0 and 1, as a loss mask: false at prompts, observations and padding.
        like: refuse other targets, sequences or turns than these.

    Returns:
        `PackedTokens`, N of them; `hidden` carries gradients to `hidden`.

    Raises:
        ValueError: shapes or devices do not fit, a first token is marked as generated (no state predicts it), or the
            tokens are not those of `like`.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[5, 6, 11, 12], [5, 14, 2, 0]])  # the second sequence is padded with 0
        >>> generated = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
        >>> packed = pack_tokens(torch.randn(2, 4, 8), ids, generated)
        >>> packed.targets.tolist(), packed.cu_seqlens.tolist()
        ([11, 12, 14, 2], [0, 2, 4])
    """
    leading = check_hidden("hidden", hidden)
    if len(leading) != 2:
        raise ValueError(f"hidden has shape {list(hidden.shape)}, needs [B, T, H], whole sequences")
    for name, value in (("input_ids", input_ids), ("generated", generated)):
        check_tensor(name, value)
        if value.shape != leading:
            raise ValueError(f"{name} has shape {list(value.shape)}, needs {list(leading)}, one value per token")
        check_device(name, value, "hidden", hidden)
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids is {input_ids.dtype}, needs an integer dtype")
    mask = _as_mask(generated)
    if mask[:, :1].any():
        row = int(mask[:, 0].nonzero()[0])
        raise ValueError(f"generated is true at the first token of sequence {row}, which no hidden state predicts")
    starts = mask & ~mask.roll(1, 1)  # the first column is false, so nothing wraps around
    turns = starts.cumsum(1) - 1
    rows = mask.flatten().nonzero().squeeze(1)
    counts = mask.sum(1)
    packed = PackedTokens(
        hidden.flatten(0, 1)[rows - 1],
        input_ids.flatten()[rows].long(),
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        turns.flatten()[rows],
    )
    if like is not None:
        _check_same(packed, like)
    return packed


def _as_mask(generated: Tensor) -> Tensor:
    if generated.dtype == torch.bool:
        return generated
    if not ((generated == 0) | (generated == 1)).all():
        raise ValueError("generated has values other than 0 and 1, needs a mask of generated tokens")
    return generated == 1


def _check_same(packed: PackedTokens, like: PackedTokens) -> None:
    """Refuse tokens, sequences or turns that are not those of `like`."""
    fix = "score the same generated tokens after both prompts"
    if packed.cu_seqlens.shape != like.cu_seqlens.shape:
        got, needed = packed.cu_seqlens.numel() - 1, like.cu_seqlens.numel() - 1
        raise ValueError(f"generated marks {got} sequences, like has {needed}; {fix}")
    lengths, wanted = packed.cu_seqlens.diff(), like.cu_seqlens.diff().to(packed.cu_seqlens.device)
    if (wrong := (lengths != wanted).nonzero()).numel():
        b = int(wrong[0])
        raise ValueError(f"generated marks {int(lengths[b])} tokens in sequence {b}, like has {int(wanted[b])}; {fix}")
    for name, values, others in (
        ("input_ids", packed.targets, like.targets),
        ("the turn", packed.turn_ids, like.turn_ids),
    ):
        if (wrong := (values != others.to(values.device)).nonzero()).numel():
            n = int(wrong[0])
            b = int(torch.searchsorted(packed.cu_seqlens, n, right=True)) - 1
            where = f"generated token {n - int(packed.cu_seqlens[b])} of sequence {b}"
            raise ValueError(f"{name} is {int(values[n])} at {where}, like has {int(others[n])}; {fix}")
