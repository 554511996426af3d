"""verl's FSDP engine, which also scores the batch's teacher in the same forward and passes the credit to the loss.

A batch carries `teacher_input_ids`, nested [B, *]: the prompt with the credit reference, then the student's response,
token for token. The teacher is the current policy, forward only. A sequence without a reference repeats its
`input_ids`: d is then exactly 0 and W exactly 1. Without the field this is verl's engine with this library's head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.padding import build_attention_mask_from_nested, no_padding_2_padding

from sgcd_kernels.credit.config import CreditConfig
from sgcd_kernels.integrations.verl.alignment import check_same_responses, predicting_states, response_lengths
from sgcd_kernels.integrations.verl.credit import credit_config, credit_metrics, response_credit
from sgcd_kernels.integrations.verl.lm_head import SIGNALS, patch_lm_head
from sgcd_kernels.integrations.verl.policy_loss import TokenWeights, token_weights

TEACHER = "teacher_input_ids"


class SGCDEngine(FSDPEngineWithLMHead):  # type: ignore[misc]  # verl is not typed
    """Registered for language models under the strategy fsdp2. FSDP1 is not supported: it was not tested.

    `actor_rollout_ref.model.fused_kernel_options.sgcd` holds the fields of `CreditConfig`. The teacher is scored when
    the policy is updated, and in a forward-only pass if the batch sets `calculate_divergence`.

    Its constructor raises ValueError for use_fused_kernels false (no divergence would be computed), for
    ulysses_sequence_parallel_size above 1 (the shards of student and teacher would not hold the same tokens), and for
    invalid credit options; `initialize` raises as `patch_lm_head` does.
    """

    model_config: Any  # verl's

    def __init__(self, model_config: Any, engine_config: Any, *others: Any, **named: Any) -> None:
        if not model_config.use_fused_kernels:
            raise ValueError("use_fused_kernels is False, needs True: only the fused head computes the divergence")
        if engine_config.ulysses_sequence_parallel_size > 1:
            size = engine_config.ulysses_sequence_parallel_size
            raise ValueError(
                f"ulysses_sequence_parallel_size is {size}, needs 1: student's and teacher's shards differ"
            )
        self.credit_config: CreditConfig = credit_config((model_config.fused_kernel_options or {}).get("sgcd"))
        super().__init__(model_config, engine_config, *others, **named)

    def _build_module(self) -> Any:
        # verl's fused forward replaces that of the whole class, and gives no logits from which to measure the head.
        given: Any = self.model_config  # type: ignore[has-type]  # verl is not typed
        self.model_config = copy.copy(given)
        object.__setattr__(self.model_config, "use_fused_kernels", False)  # its configs are frozen
        try:
            module = super()._build_module()
        finally:
            self.model_config = given
        patch_lm_head(module, packed=self.use_remove_padding)
        return module

    def forward_step(self, micro_batch: Any, loss_function: Callable[..., Any] | None, forward_only: bool) -> Any:
        wanted = loss_function is not None or tensordict_utils.get(micro_batch, "calculate_divergence", default=False)
        if TEACHER not in micro_batch or not wanted:
            if TEACHER in micro_batch:
                micro_batch = micro_batch.exclude(TEACHER)
            return super().forward_step(micro_batch, loss_function, forward_only)
        if loss_function is not None:
            loss_function = self._with_credit(loss_function)
        return super().forward_step(micro_batch, loss_function, forward_only)

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        if TEACHER in micro_batch:
            inputs |= self._teacher_inputs(micro_batch)
        return inputs, output_args

    def _teacher_inputs(self, micro_batch: Any) -> dict[str, Tensor | None]:
        """The teacher's inputs, packed or padded as the student's, and the indices of the states to compare."""
        ids, theirs = micro_batch["input_ids"], micro_batch[TEACHER]
        responses = response_lengths(micro_batch).to(ids.device)
        check_same_responses(ids, theirs, responses)
        lengths, their_lengths = (x.offsets().diff().to(ids.device) for x in (ids, theirs))
        positions = torch.cat([torch.arange(int(n), device=ids.device) for n in their_lengths])
        if _packed(micro_batch):
            stride = their_stride = None
            their_ids, mask, positions = theirs.values()[None], None, positions[None]
        else:
            stride, their_stride = int(lengths.max()), int(their_lengths.max())
            their_ids = theirs.to_padded_tensor(0)
            mask = build_attention_mask_from_nested(theirs, their_stride)
            positions = torch.arange(their_stride, device=ids.device).expand(len(their_lengths), -1)
        return {
            TEACHER: their_ids,
            "teacher_attention_mask": mask,
            "teacher_position_ids": positions,
            "student_rows": predicting_states(lengths, responses, stride),
            "teacher_rows": predicting_states(their_lengths, responses, their_stride),
        }

    def prepare_model_outputs(self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any) -> Any:
        found = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        offsets = micro_batch["input_ids"].offsets()
        for name in SIGNALS if output.reverse_kl is not None else ():
            values = getattr(output, name)
            if _packed(micro_batch):
                values = self._gather_and_unpad_packed(values.squeeze(0), output_args["pad_size"])
            else:
                real = torch.arange(values.shape[1], device=values.device) < offsets.diff()[:, None]
                values = values[real]
            found[name] = torch.nested.nested_tensor_from_jagged(values, offsets)
        return found

    def _with_credit(self, loss_function: Callable[..., Any]) -> Callable[..., Any]:
        """The loss, called while the token weights of its micro-batch are set."""

        def credited(*others: Any, **named: Any) -> Any:
            output, data = named.get("model_output"), named.get("data")
            if output is None or "reverse_kl" not in output:  # not called for the loss
                return loss_function(*others, **named)
            with token_weights(self._credit(output, data)):
                return loss_function(*others, **named)

        return credited

    def _credit(self, output: Any, data: Any) -> TokenWeights:
        signals = {name: no_padding_2_padding(output[name], data) for name in SIGNALS}
        batch = data.select(*(x for x in ("response_mask", "advantages", "turn_ids") if x in data)).to_padded_tensor()
        credit = response_credit(
            signals,
            batch["response_mask"],
            advantages=batch["advantages"],
            turn_ids=batch.get("turn_ids", None),
            config=self.credit_config,
        )
        return TokenWeights(credit.weights, credit_metrics(credit, signals, batch["response_mask"], self.credit_config))


def _packed(micro_batch: Any) -> bool:
    return bool(tensordict_utils.get_non_tensor_data(micro_batch, "use_remove_padding", default=True))
