"""A language model whose forward returns log-probs, entropy and divergence from hidden states instead of logits.

It does what verl's fused forwards do (`verl.models.transformers.dense_common`), on these kernels, and adds a teacher:
the same weights on other ids, without gradients. The ops run inside the head's forward, because FSDP2 may shard the
head as a separate unit (verl does, if it is not tied), and its weight is gathered only there.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from verl.models.transformers.dense_common import CausalLMOutputForPPO

from sgcd_kernels.measured_head import OutputHead, output_head
from sgcd_kernels.models import check_model
from sgcd_kernels.ops.divergence import DivergenceStats, linear_divergence
from sgcd_kernels.ops.logprob import linear_logprob

# Fields of DivergenceStats that credit rules read.
SIGNALS = (
    "reverse_kl",
    "forward_kl",
    "bhattacharyya",
    "student_logp",
    "teacher_logp",
    "student_entropy",
    "teacher_entropy",
)


@dataclass
class ScoredOutput(CausalLMOutputForPPO):  # type: ignore[misc]  # verl is not typed
    """verl's output of a fused forward and, with a teacher, the `SIGNALS`: [b, t] each, 0 where not compared."""

    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None
    bhattacharyya: Tensor | None = None
    student_logp: Tensor | None = None
    teacher_logp: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None


def patch_lm_head(model: nn.Module, *, packed: bool = False) -> None:
    """Replace the forward of this model (not of its class) by one that returns a `ScoredOutput`.

    It takes the arguments of verl's fused forwards: `temperature`, and `shift_labels` [b, t], the token that each state
    predicts (by default the input ids, rolled). `packed` is as for `check_model`. A teacher is given by
    `teacher_input_ids` [b', t'] with its `teacher_position_ids` and `teacher_attention_mask`, and by the flat indices
    `student_rows` and `teacher_rows` [R] of the states to compare.

    Raises ValueError as `check_model` does, and for a model that reads images, which the teacher's prompt would lack.
    """
    check_model(model, packed=packed)
    config: Any = model.config
    if hasattr(config, "vision_config"):
        raise ValueError(f"{type(model).__name__} has a vision_config, needs a model of text alone")
    measured = output_head(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> ScoredOutput:
        return _forward(self, measured, *args, **kwargs)

    head: Any = model.get_output_embeddings()  # type: ignore[operator]  # check_model has seen that it is there
    head.forward = types.MethodType(_score, head)
    model.forward = types.MethodType(forward, model)


def _forward(
    self: Any,
    measured: OutputHead,
    input_ids: Tensor,  # [b, t]
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,  # [b, t]
    temperature: float = 1.0,
    shift_labels: Tensor | None = None,  # [b, t]
    teacher_input_ids: Tensor | None = None,  # [b', t']
    teacher_attention_mask: Tensor | None = None,
    teacher_position_ids: Tensor | None = None,
    student_rows: Tensor | None = None,  # [R]
    teacher_rows: Tensor | None = None,  # [R]
    return_dict: bool = True,
    logits_to_keep: int = 0,
    **model_inputs: Any,
) -> ScoredOutput:
    decoder, head = self.get_decoder(), self.get_output_embeddings()
    states: Tensor = decoder(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **model_inputs
    ).last_hidden_state
    if shift_labels is None:
        shift_labels = (input_ids if labels is None else labels).roll(-1, dims=-1)
    theirs = None
    if teacher_input_ids is not None:
        with torch.no_grad():
            theirs = decoder(
                input_ids=teacher_input_ids,
                attention_mask=teacher_attention_mask,
                position_ids=teacher_position_ids,
                use_cache=False,
            ).last_hidden_state
    return ScoredOutput(**head(states, shift_labels, temperature, measured, theirs, student_rows, teacher_rows))


def _score(
    self: nn.Linear,
    states: Tensor,  # [b, t, H]
    labels: Tensor | None = None,  # [b, t]
    temperature: float = 1.0,
    measured: OutputHead | None = None,
    theirs: Tensor | None = None,  # [b', t', H]
    student_rows: Tensor | None = None,  # [R]
    teacher_rows: Tensor | None = None,  # [R]
) -> Tensor | dict[str, Tensor]:
    """The fields of a `ScoredOutput`; without labels, the logits as from any head."""
    if labels is None or measured is None:
        return nn.functional.linear(states, self.weight, self.bias)
    options = measured.options(temperature)
    stats = linear_logprob(states, self.weight, labels, **options)
    found = {"log_probs": stats.logp, "entropy": stats.entropy}
    if theirs is not None and student_rows is not None and teacher_rows is not None:
        pair = (_rows(states, student_rows), self.weight, labels.reshape(-1)[student_rows], _rows(theirs, teacher_rows))
        found |= _placed(linear_divergence(*pair, **options), student_rows, labels.shape)
    return found


def _rows(states: Tensor, rows: Tensor) -> Tensor:  # [b, t, H], [R] -> [R, H]
    return states.reshape(-1, states.shape[-1]).index_select(0, rows)


def _placed(stats: DivergenceStats, rows: Tensor, leading: torch.Size) -> dict[str, Tensor]:
    """The results of the comparison, scattered to [b, t]."""

    def place(values: Tensor) -> Tensor:
        return values.new_zeros(leading.numel()).index_copy_(0, rows, values).reshape(leading)

    return {name: place(getattr(stats, name)) for name in SIGNALS}
