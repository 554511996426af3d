"""Refuses unsupported configurations when a trainer is constructed, not in the middle of training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ProcessorMixin

from sgcd_kernels.credit.rules import never_acts
from sgcd_kernels.integrations.trl.config import SGCDConfig

# The ways on, for whoever took SGCDTrainer for GRPOTrainer.
PLAIN = "SGCDConfig(gamma=0.0) trains without credit, as GRPOTrainer does"


def check_arguments(args: SGCDConfig, dataset: Any, reference_func: Any, processor: Any = None) -> None:
    """Checks before anything is loaded. Raises ValueError or TypeError."""
    if not isinstance(args, SGCDConfig):
        raise TypeError(
            f"args is {type(args).__name__}, needs SGCDConfig, which is a GRPOConfig with gamma, clip, ...; {PLAIN}"
        )
    check_stage(args)
    if reference_func is not None and not callable(reference_func):
        raise TypeError(f"reference_func is {type(reference_func).__name__}, needs a function of Siblings")
    if never_acts(args.credit()):
        return
    check_processor(processor)
    if args.importance_sampling_level == "sequence" and args.loss_type != "cispo":  # whose ratio is detached
        raise ValueError(
            "importance_sampling_level is 'sequence', needs 'token' (or loss_type 'cispo'): all gradients of a "
            "sequence go through one ratio, so every token would get the mean of A W"
        )
    if reference_func is not None:
        rows = args.per_device_train_batch_size * args.steps_per_generation
        if rows % args.num_generations:
            raise ValueError(
                f"a process generates {rows} rollouts (per_device_train_batch_size x steps_per_generation), needs a "
                f"multiple of num_generations {args.num_generations}: reference_func gets whole groups"
            )
        return
    column = args.reference_column
    if args.remove_unused_columns:
        raise ValueError(f"remove_unused_columns is True, needs False: column {column!r} would not reach the trainer")
    columns = getattr(dataset, "column_names", None)  # None for a stream with unknown columns
    if columns is not None and column not in columns:
        raise ValueError(
            f"train_dataset has no column {column!r} (it has {', '.join(columns)}), which the teacher reads: add it, "
            f"or name another as reference_column, or give SGCDTrainer a reference_func; {PLAIN}"
        )


def check_trainer(trainer: Any) -> None:
    """Checks of the trainer after TRL's constructor. Raises ValueError."""
    if never_acts(trainer.args.credit()):
        return
    check_processor(trainer.processing_class)
    check_dropout(trainer.model)


def check_dropout(model: Any) -> None:
    """Raises ValueError for dropout, as a module or as a number in a module (transformers' attention)."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            if module.p > 0:
                raise ValueError(
                    f"{name} drops out with p = {module.p}: student and teacher would differ at random; needs "
                    "disable_dropout=True (in SGCDConfig), or lora_dropout=0"
                )
            continue
        for field, value in vars(module).items():
            if "drop" in field and type(value) is float and value > 0:
                raise ValueError(
                    f"{name or 'the model'} drops out with {field} = {value}: student and teacher would differ at "
                    "random; needs 0.0 in the model's config, because disable_dropout=True changes only nn.Dropout"
                )


def check_processor(processor: Any) -> None:
    """Raises ValueError for a processor of images or sound, which only a trainer without credit may have."""
    if isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"processing_class is a {type(processor).__name__}, needs a tokenizer for credit: "
            f"teacher prompts are text; {PLAIN}"
        )


def check_stage(args: Any) -> None:
    """Raises ValueError for DeepSpeed ZeRO-3."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError("DeepSpeed ZeRO-3 is not supported: it frees the head's weight before backward; use stage 2")
