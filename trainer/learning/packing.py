"""From rollouts to the rectangles a model reads, and back to the tokens that carry a loss.

A model's row is prompt + rollout, padded on the right. Student and teacher rows differ in the prompt only, so both give
one hidden state for each generated token, in the same order: they are aligned by that order, never by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from trainer.data import Rollout
from trainer.learning.model import hidden_states


@dataclass(frozen=True)
class LossTokens:
    """The generated tokens of some rollouts, packed: what losses and credit are computed on."""

    rollouts: list[Rollout]
    targets: Tensor  # [N]
    logprobs: Tensor  # [N] under the policy that sampled: the engine's
    turns: Tensor  # [N]
    cu_seqlens: Tensor  # [B + 1]

    @staticmethod
    def of(rollouts: Sequence[Rollout], device: torch.device) -> LossTokens:
        targets = [i for r in rollouts for i, own in zip(r.ids, r.generated) if own]
        turns = [t for r in rollouts for t, own in zip(r.turns, r.generated) if own]
        logprobs = [p for r in rollouts for p, own in zip(r.logprobs, r.generated) if own]
        ends = accumulate((sum(r.generated) for r in rollouts), initial=0)
        as_tensor = [torch.tensor(x, dtype=torch.long, device=device) for x in (targets, turns, list(ends))]
        sampled_at = torch.tensor(logprobs, dtype=torch.float32, device=device)
        return LossTokens(list(rollouts), as_tensor[0], sampled_at, *as_tensor[1:])

    def spread(self, values: Tensor) -> Tensor:  # [B] -> [N]
        """Repeat one value per rollout as one value per token."""
        return values.to(self.targets.device).repeat_interleave(self.cu_seqlens.diff())

    def unpack(self, values: Tensor, fill: float) -> list[Tensor]:  # [N] -> [T] each
        """Split one value per loss token into a tensor per rollout, aligned with its ids; `fill` at observed tokens."""
        rows = []
        for rollout, own in zip(self.rollouts, torch.split(values.detach().cpu(), self.cu_seqlens.diff().tolist())):
            row = torch.full((len(rollout.ids),), fill, dtype=values.dtype)
            row[torch.tensor(rollout.generated, dtype=torch.bool)] = own
            rows.append(row)
        return rows


def right_pad(rows: Sequence[Sequence[int]], pad: int) -> Tensor:  # [B, T]
    """Right-pad to a rectangle. Under causal attention no real token ever sees the padding, so no mask is needed."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])


def forward(model: object, prompts: Sequence[Sequence[int]], rollouts: Sequence[Rollout], pad_id: int) -> Tensor:
    """Hidden states [N, H] that predict the generated tokens of `rollouts`, read after `prompts`."""
    rows = [[*prompt, *rollout.ids] for prompt, rollout in zip(prompts, rollouts, strict=True)]
    ids = right_pad(rows, pad_id)
    at = [
        row * ids.shape[1] + len(prompt) + token - 1  # the token before predicts it
        for row, (prompt, rollout) in enumerate(zip(prompts, rollouts))
        for token, own in enumerate(rollout.generated)
        if own
    ]
    parameter = next(model.parameters())  # type: ignore[attr-defined]
    states = hidden_states(model, ids.to(parameter.device)).flatten(0, 1)
    return states[torch.tensor(at, device=parameter.device)]


def microbatches(rollouts: Sequence[Rollout], budget: int) -> list[list[int]]:
    """Indices of rollouts in batches of at most `budget` tokens, padding included; neighbours in length together."""
    size = [len(r.prompt_ids) + len(r.ids) for r in rollouts]
    batches: list[list[int]] = []
    for index in sorted(range(len(rollouts)), key=lambda i: size[i]):  # rising: the newest row is the widest
        if not batches or (len(batches[-1]) + 1) * size[index] > budget:
            batches.append([])
        batches[-1].append(index)
    return batches
