"""Sibling-guided credit (arXiv 2606.12634) in TRL's GRPOTrainer.

TRL's loss takes per-token advantages and asks the model for log-probs, not logits, so three hooks are enough: teacher
prompts are built from the group's siblings after the completions are rewarded; the fused head is `LinearHead`; and
inside the loss, once the student's hidden states are known, the advantages become A W. Every loss type and option
remains TRL's code, and without credit this is the stock trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, pad

from sgcd_kernels.credit.rules import never_acts
from sgcd_kernels.integrations.trl.config import SGCDConfig
from sgcd_kernels.integrations.trl.credit import Batch, metrics, weigh
from sgcd_kernels.integrations.trl.head import LinearHead, Unprojected
from sgcd_kernels.integrations.trl.references import Prompt, Reference, ReferenceFunc, Siblings, ask, teacher_prompt
from sgcd_kernels.integrations.trl.refusals import check_arguments, check_trainer

PAPER = {
    "title": "Sibling-Guided Credit Distillation",
    "id": "2606.12634",
    "citation": "@article{sgcd2026, title = {{Sibling-Guided Credit Distillation}}, eprint = {arXiv:2606.12634}}",
}


class SGCDTrainer(GRPOTrainer):  # type: ignore[misc]
    """trl.GRPOTrainer with per-token advantages, weighted by the divergence from a teacher that reads a reference.

    Args:
        model, reward_funcs, args, train_dataset, ...: as GRPOTrainer's, in its order; `args` an `SGCDConfig`, whose
            default has credit (gamma 1) and so needs a reference.
        reference_func: called with each group's `Siblings`, returns its reference: a text, the teacher's whole prompt
            as messages, or None. May be `async def`; then all groups of a batch are awaited together. Without it each
            row's reference comes from the column `args.reference_column`.

    The teacher is the policy itself at the same weights, forward only. A rollout without a reference has W = 1. With
    gamma = 0 or rule "none" there is no teacher pass. Credit is not used in evaluation.

    Raises:
        ValueError, TypeError: at construction, for options that cannot work together (docs/trl.md lists them).
    """

    _tag_names = ["trl", "sgcd"]
    _name = "SGCD"
    _paper = PAPER

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: SGCDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        reference_func: ReferenceFunc | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SGCDConfig(f"{name.split('/')[-1]}-SGCD")
        check_arguments(args, train_dataset, reference_func, processing_class)
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_processing_classes,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
            tools,
            rollout_func,
            environment_factory,
        )
        check_trainer(self)
        self.reference_func = reference_func
        if self._is_vlm:  # there is no credit, so this is the stock trainer, its head included
            return
        options = {"temperature": self.temperature, "fp32": args.cast_lm_head_to_fp32}
        self._head = LinearHead(self.model.get_base_model() if is_peft_model(self.model) else self.model, **options)
        if self.ref_model is not None:
            LinearHead(self.accelerator.unwrap_model(self.ref_model), **options)
        self._scored: tuple[list[Any], list[Prompt], list[Any], list[list[int]], list[float]]

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Prompt], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> Tensor:
        """As TRL's; also keeps the inputs, which are the siblings."""
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(prompts)
        mine = rewards[first : first + len(prompts)]
        total = (mine * self.reward_weights.to(mine.device)).nansum(dim=1)
        total = total.masked_fill(mine.isnan().all(dim=1), torch.nan)
        self._scored = (inputs, prompts, completions, completion_ids_list, total.tolist())
        return rewards

    def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
        """As TRL's; also adds the teacher's prompts, [B, P'] ids padded left, and which rows have a reference."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.model.training and not never_acts(self.args.credit()):
            output.update(self._teacher_prompts(output["prompt_ids"], output["prompt_mask"]))
        return output

    def _teacher_prompts(self, prompt_ids: Tensor, prompt_mask: Tensor) -> dict[str, Tensor]:
        prompts = self._scored[1]
        own = [ids[mask != 0].tolist() for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
        teachers = [teacher_prompt(p, r) for p, r in zip(prompts, self._references(), strict=True)]
        read, given = own, [t is not None for t in teachers]
        if any(given):
            if self.rollout_func is not None and self._tokenize_prompts(prompts)[0] != own:
                raise ValueError(
                    "rollout_func's prompt_ids differ from those of the tokenizer's chat template: a teacher's prompt "
                    "would differ by more than its reference; needs the trainer's template in rollout_func"
                )
            told = self._tokenize_prompts([p if t is None else t for p, t in zip(prompts, teachers, strict=True)])[0]
            read = [list(t) if has else o for t, has, o in zip(told, given, own, strict=True)]
        device, filler = prompt_ids.device, self._tokenizer.pad_token_id
        rows = [torch.tensor(ids) for ids in read]
        masks = [torch.ones_like(ids) for ids in rows]
        return {
            "teacher_prompt_ids": pad(rows, padding_value=filler, padding_side="left").to(device),
            "teacher_prompt_mask": pad(masks, padding_value=0, padding_side="left").to(device),
            "has_teacher": torch.tensor([r != o for r, o in zip(read, own, strict=True)], device=device),
        }

    def _references(self) -> list[Reference]:
        """One per rollout of this process."""
        rows, prompts, completions, ids, rewards = self._scored
        if self.reference_func is None:
            if missing := [row for row in rows if self.args.reference_column not in row]:
                raise ValueError(f"a row has no column {self.args.reference_column!r}, only {', '.join(missing[0])}")
            return [row[self.args.reference_column] for row in rows]
        n = self.num_generations
        groups = []
        for i in range(0, len(rows), n):
            of = slice(i, i + n)
            groups.append(Siblings(prompts[i], completions[of], ids[of], rewards[of], rows[of]))
        return [reference for reference in ask(self.reference_func, groups) for _ in range(n)]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if "teacher_prompt_ids" not in inputs:
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        inputs = dict(inputs)  # the next iteration computes new weights
        teacher = self._teacher(model, inputs)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        batch = Batch(inputs["completion_ids"], mask, inputs["advantages"], inputs["has_teacher"])
        found: list[Tensor] = []

        def observe(student: Unprojected) -> None:
            # TRL's loss reads the advantages after it has computed the log-probs.
            student = student[:, -mask.shape[1] :]
            inputs["advantages"], sums = weigh(student, teacher, batch, self.args.credit(salt=self._step))
            found.append(sums)

        with self._head.observed_by(observe):
            loss = super()._compute_loss(model, inputs)
        assert len(found) == 1, "TRL's loss ran more or fewer than one scoring pass"
        for name, value in metrics(self.accelerator.reduce(found[0], reduction="sum")).items():
            self._metrics["train"][name].append(value)
        return loss

    @torch.no_grad()
    def _teacher(self, model: Any, inputs: dict[str, Tensor]) -> Unprojected:  # [B, T]
        """The policy's hidden states over the same completions, after the prompt with the reference."""
        ids = torch.cat([inputs["teacher_prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["teacher_prompt_mask"], inputs["completion_mask"]], dim=1)
        quiet: Callable[..., Any] = disable_gradient_checkpointing
        with (
            quiet(self.model, self.args.gradient_checkpointing_kwargs),
            self._head.lazily(),
            self.accelerator.autocast(),
        ):
            found: Unprojected = model(input_ids=ids, attention_mask=mask).logits
        return found[:, -1 - inputs["completion_ids"].shape[1] : -1]
