"""verl's synchronous trainer, which also gets references between rollout and update.

Select it by trainer.v1.trainer_mode=sgcd_sync, and name this module in VERL_USE_EXTERNAL_MODULES: verl looks the
trainer up in a Ray actor before it imports any `external_lib`.
"""

from __future__ import annotations

from typing import Any

import sgcd_kernels.integrations.verl.register  # noqa: F401  # isort: skip  # first: it says which versions fit

import transfer_queue as tq
from omegaconf import open_dict
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import resolve_config_path
from verl.tools.tool_registry import load_all_tools
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from sgcd_kernels.integrations.trl.references import Message
from sgcd_kernels.integrations.verl.engine import TEACHER
from sgcd_kernels.integrations.verl.references import COLUMNS, FIELDS, Render, padding_rows, teacher_field
from sgcd_kernels.integrations.verl.settings import TRAINER, check_config, reference_function


@register_trainer(TRAINER)
class SGCDTrainerSync(PPOTrainerSync):  # type: ignore[misc]  # verl is not typed
    """PPOTrainerSync whose batches carry `teacher_input_ids`.

    Its constructor raises ValueError as `check_config` and `reference_function` do.
    """

    def __init__(self, config: Any) -> None:
        check_config(config)
        self.reference_func = reference_function(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl chooses buffer, refill and checkpoints by this name
        super().__init__(config)

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        self._render = renderer(self.config, self.tokenizer)

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)  # no end-of-turn tokens in references
        return text

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        columns = [name for name in COLUMNS if name in (batch.fields or ())]
        data = tq.kv_batch_get(**where, select_fields=[*FIELDS, *columns])
        teacher, metrics["credit/frac_referenced"] = teacher_field(
            data, padding_rows(batch.tags), self.reference_func, self._render, self._text
        )
        return tq.kv_batch_put(**where, fields=TensorDict({TEACHER: teacher}, batch_size=len(batch)))


def renderer(config: Any, tokenizer: Any) -> Render:
    """Renders the first prompt of a rollout by the tokenizer's chat template, with the tools of the config."""
    turns = config.actor_rollout_ref.rollout.multi_turn
    paths = (turns.tool_config_path, turns.function_tool_path)
    tools = load_all_tools(*(resolve_config_path(path) if path else None for path in paths))
    schemas = [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in tools]
    options = dict(config.data.get("apply_chat_template_kwargs") or {})

    def render(messages: list[Message]) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(
            messages, tools=schemas or None, add_generation_prompt=True, return_dict=False, **options
        )
        return ids

    return render
