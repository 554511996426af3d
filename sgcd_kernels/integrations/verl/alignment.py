"""Aligns the states of student and teacher, which read different prompts and the same response.

They are aligned by the index of the generated token, not by position: a reference makes the teacher's prompt longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def response_lengths(batch: Any) -> Tensor:  # [B] int64
    """Tokens of each response of a verl TensorDict, nested or padded."""
    responses = batch["responses"]
    if responses.is_nested:
        lengths: Tensor = responses.offsets().diff()
        return lengths
    width = responses.shape[1]
    counted: Tensor = batch["attention_mask"][:, -width:].sum(dim=1)
    return counted.long()


def predicting_states(
    lengths: Tensor,  # [B], tokens of prompt and response together
    responses: Tensor,  # [B], of the response alone
    stride: int | None,  # None: sequences are packed one after the other; else the length of a padded row
) -> Tensor:  # [R] int64
    """The flat indices of the states that predict the responses' tokens: each lies one before its token.

    Raises ValueError for a sequence without a prompt, whose first token no state predicts.
    """
    if bool((lengths <= responses).any()):
        row = int((lengths <= responses).nonzero()[0])
        got = f"{int(lengths[row])} tokens for a response of {int(responses[row])}"
        raise ValueError(f"sequence {row} has {got}, needs a prompt of at least one token before it")
    starts = (
        lengths.cumsum(0) - lengths if stride is None else torch.arange(len(lengths), device=lengths.device) * stride
    )
    first = (starts + lengths - responses - 1).repeat_interleave(responses)
    within = torch.arange(int(responses.sum()), device=lengths.device)
    return first + within - (responses.cumsum(0) - responses).repeat_interleave(responses)


def check_same_responses(student: Tensor, teacher: Tensor, responses: Tensor) -> None:
    """Refuse teacher ids whose last tokens are not the student's response; both nested [B, *], jagged."""
    pairs = zip(student.unbind(), teacher.unbind(), responses.tolist(), strict=True)
    for row, (ours, theirs, count) in enumerate(pairs):
        if not torch.equal(ours[len(ours) - count :], theirs[max(len(theirs) - count, 0) :]):
            what = f"its last {count} tokens to be the student's response"
            raise ValueError(f"teacher_input_ids of sequence {row} does not end as input_ids, needs {what}")


def teacher_input_ids(
    prompts: Sequence[Sequence[int] | Tensor],  # of each sequence, with its credit reference
    responses: Tensor,  # nested [B, *], jagged; the student's
) -> Tensor:  # nested [B, *], jagged
    """The teacher's field of a batch: each prompt, followed by the student's response token by token."""
    if len(prompts) != responses.shape[0]:
        raise ValueError(f"prompts has {len(prompts)} entries, needs {responses.shape[0]}, one per response")
    rows = [
        torch.cat([torch.as_tensor(prompt, dtype=response.dtype, device=response.device), response])
        for prompt, response in zip(prompts, responses.unbind(), strict=True)
    ]
    made: Tensor = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return made
