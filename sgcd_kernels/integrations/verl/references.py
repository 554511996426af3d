"""From finished rollouts to the teacher's input: siblings, their reference, and a prompt that contains it.

References are as in TRL (`sgcd_kernels.integrations.trl.references`, which needs no TRL): a text, messages or None.
Here they may also be the token ids of the teacher's whole prompt, for agents that build their prompts themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sgcd_kernels.integrations.trl.references import Message, Siblings, ask, teacher_prompt
from sgcd_kernels.integrations.verl.alignment import teacher_input_ids

FIELDS = ("uid", "raw_prompt", "prompts", "responses", "rm_scores")  # required in a batch
COLUMNS = ("data_source", "reward_model", "extra_info")  # of verl's data sets: in `Siblings.rows`, if present

Render = Callable[[list[Message]], Sequence[int]]  # with the chat template of the rollouts' prompts


def teacher_field(
    batch: Any,  # TensorDict of FIELDS, a row per rollout in any order
    padding: Sequence[bool],  # rows that verl added to fill the batch; they belong to no group
    function: Callable[[Siblings], Any],
    render: Render,
    decode: Callable[[list[int]], str],
) -> tuple[Tensor, float]:
    """(`teacher_input_ids`, nested [B, *]; the fraction of rollouts with a reference). Rows of one uid are a group.

    Raises ValueError if `render` does not give the ids that the rollouts began with, because the teacher's prompt would
    then differ by more than its reference; and as `teacher_prompt` does.
    """
    prompts = [prompt.tolist() for prompt in batch["prompts"].unbind()]
    groups: dict[str, list[int]] = {}
    for row, uid in enumerate(batch["uid"]):
        if not padding[row]:
            groups.setdefault(uid, []).append(row)
    references = ask(function, [_siblings(batch, rows, decode) for rows in groups.values()])
    told = 0
    for rows, reference in zip(groups.values(), references, strict=True):
        if reference:
            ids = _teacher_ids(list(batch["raw_prompt"][rows[0]]), [prompts[row] for row in rows], reference, render)
            prompts = [ids if row in rows else own for row, own in enumerate(prompts)]
            told += len(rows)
    return teacher_input_ids(prompts, batch["responses"]), told / max(len(prompts) - sum(padding), 1)


def _siblings(batch: Any, rows: list[int], decode: Callable[[list[int]], str]) -> Siblings:
    responses, scores = batch["responses"].unbind(), batch["rm_scores"].unbind()
    ids = [responses[row].tolist() for row in rows]
    columns = [name for name in COLUMNS if name in batch]
    return Siblings(
        prompt=list(batch["raw_prompt"][rows[0]]),
        completions=[decode(response) for response in ids],
        completion_ids=ids,
        rewards=[float(scores[row].sum()) for row in rows],
        rows=[{name: batch[name][row] for name in columns} for row in rows],
    )


def _teacher_ids(messages: list[Message], own: list[list[int]], reference: Any, render: Render) -> list[int]:
    if not isinstance(reference, str) and all(isinstance(token, int) for token in reference):
        return list(reference)
    rendered = list(render(messages))
    for prompt in own:
        if prompt != rendered:
            raise ValueError(
                f"the rollout's prompt has {len(prompt)} tokens, the chat template gives {len(rendered)} others: "
                "the teacher's prompt would differ by more than its reference; needs a reference of token ids"
            )
    told = teacher_prompt(messages, reference)
    assert isinstance(told, list), "messages and a reference make messages"
    return list(render(told))


def padding_rows(tags: Sequence[dict[str, Any]]) -> list[bool]:
    """Which rows of a verl batch are padding."""
    return [bool(tag.get("is_padding", False)) for tag in tags]
