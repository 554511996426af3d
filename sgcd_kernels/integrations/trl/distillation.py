"""TRL's distillation trainers without logits: a context manager in which they use our per-token divergences.

    with linear_distillation(trainer):
        trainer.train()

Inside, the models that the loss compares stop at their hidden states (`LinearHead`), and the functions that turn two
logits into one value per token are replaced by `linear_distill_loss(reduction="none")` and `linear_logprob`. Masks,
importance clipping, reductions and metrics remain TRL's code. On exit the trainer is restored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from sgcd_kernels import OutputHead, linear_distill_loss
from sgcd_kernels.integrations.trl.head import IGNORED, LinearHead, Unprojected, measure_head, unproject
from sgcd_kernels.integrations.trl.refusals import check_stage

Replacements = list[tuple[Any, str, Any]]


@contextmanager
def linear_distillation(trainer: Any) -> Iterator[None]:
    """Run a GKDTrainer, GOLDTrainer, SDPOTrainer, SDFTTrainer or DistillationTrainer without logits.

    Losses and gradients equal those of the trainer's stock path up to rounding. Raises ValueError on entry, with the
    reason, for any other trainer and for a setting whose loss cannot be computed exactly.
    """
    names = [kind.__name__ for kind in type(trainer).__mro__]
    for name in names:
        if name in REFUSED:
            raise ValueError(f"{name} is not served by linear_distillation: {REFUSED[name]}")
    served = next((name for name in names if name in SERVED), None)
    if served is None:
        raise ValueError(f"{names[0]} is not served by linear_distillation, which serves {', '.join(sorted(SERVED))}")
    check_stage(trainer.args)
    with ExitStack() as stack:
        for owner, attribute, value in SERVED[served](trainer):
            stack.enter_context(_replaced(owner, attribute, value))
        yield


REFUSED = {
    "ServerDistillationTrainer": "its teacher is a server, which gives log-probs and no hidden states",
    "AsyncDistillationTrainer": "its teacher is a server, which gives log-probs and no hidden states",
    "IWOPDTrainer": "its losses over top-k vocab ids or over a server's log-probs need the logits",
}


def per_token(student: Unprojected, teacher: Unprojected, beta: float, mask: Tensor | None = None) -> Tensor:
    """Per token, with TRL's beta: KL(q || p) at 0, KL(p || q) at 1, else the JSD with weight beta on the teacher.

    [B, L] fp32, differentiable in the student; 0 where masked. Both use the student's temperature and softcap.
    """
    loss: Tensor = linear_distill_loss(
        student.hidden,
        student.weight,
        teacher.hidden,
        teacher.weight,
        mask=mask,
        kind={0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd"),
        beta=beta,
        reduction="none",
        bias=student.bias,
        teacher_bias=teacher.bias,
        temperature=student.temperature,
        softcap=student.softcap,
    )
    return loss


def _gkd(trainer: Any) -> Replacements:
    """GKDTrainer, and GOLDTrainer where student and teacher share a tokenizer."""
    if getattr(trainer, "use_uld_loss", False):
        raise ValueError(
            "GOLDTrainer with use_uld_loss is not served by linear_distillation: that loss sorts the vocabularies of "
            "two tokenizers, which needs their logits"
        )
    if trainer.compute_metrics is not None or trainer.preprocess_logits_for_metrics is not None:
        raise ValueError("compute_metrics is given, needs None: it reads logits, and there are none")
    _measure_heads(trainer)
    heads = [LinearHead(model) for model in _models(trainer)]
    return [
        (trainer, "compute_loss", _lazy(trainer.compute_loss, heads, trainer.accelerator)),
        (trainer, "generalized_jsd_loss", jsd_loss),
    ]


def jsd_loss(
    student_logits: Unprojected,
    teacher_logits: Unprojected,
    labels: Tensor,  # [B, L], -100 where a token has no loss
    beta: float = 0.5,
    temperature: float = 1.0,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Replaces the trainers' `generalized_jsd_loss`, with the same arguments and result."""
    mask = labels != -100
    values = per_token(student_logits / temperature, teacher_logits / temperature, float(beta), mask)
    return values.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def _self_distillation(trainer: Any) -> Replacements:
    """SDPOTrainer and SDFTTrainer."""
    args = trainer.args
    name = next(k.__name__ for k in type(trainer).__mro__ if k.__name__ in ("SDPOTrainer", "SDFTTrainer"))
    if trainer.use_teacher_server:
        raise ValueError(f"{name} with use_teacher_server is not served: a server gives log-probs, no hidden states")
    if args.distillation_mode == "topk_logits":
        raise ValueError(
            f"{name} with distillation_mode 'topk_logits' is not served by linear_distillation: its support is the "
            "student's top-k vocab ids, which need logits; use 'full_logits' (exact, at the same cost here)"
        )
    _measure_heads(trainer)
    heads = [LinearHead(model) for model in {id(model): model for model in _models(trainer)}.values()]
    module = _module(trainer, name)
    functions: dict[str, Callable[..., Tensor]] = {
        "selective_log_softmax": lambda logits, index: logits.logprob(index).logp,
        "compute_full_logit_self_distillation_loss": lambda student, teacher, *, distillation_alpha: per_token(
            student, teacher, float(distillation_alpha)
        ),
        "compute_sampled_token_self_distillation_loss": sampled_token_loss,
    }
    swaps = [(module, f, _dispatched(getattr(module, f), ours)) for f, ours in functions.items()]
    return [*swaps, (trainer, "_forward_logits", _lazy(trainer._forward_logits, heads, trainer.accelerator))]


def sampled_token_loss(
    student_logits: Unprojected, teacher_logits: Unprojected, completion_ids: Tensor, *, distillation_alpha: float
) -> Tensor:
    """The one-sample estimate of the reverse KL's gradient: stop_gradient(log p(y) - log q(y)) log p(y)."""
    student = student_logits.logprob(completion_ids).logp
    with torch.no_grad():
        teacher = teacher_logits.logprob(completion_ids).logp
    return (student.detach() - teacher) * student


def _distillation(trainer: Any) -> Replacements:
    """DistillationTrainer already compares hidden states, in one function of its module."""
    student, teacher = _measure_heads(trainer)
    measured = {
        "student_logit_scale": student.scale,
        "teacher_logit_scale": teacher.scale,
        "student_final_logit_softcapping": student.softcap,
        "teacher_final_logit_softcapping": teacher.softcap,
    }

    def loss(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        biases = {"student_lm_head_bias": student.options()["bias"], "teacher_lm_head_bias": teacher.options()["bias"]}
        return chunked_loss(*tensors, **{**options, **measured, **biases})

    return [(_module(trainer, "DistillationTrainer"), "_chunked_divergence_loss", loss)]


def chunked_loss(
    student_hidden_states: Tensor,  # [B, L, H]
    teacher_hidden_states: Tensor,  # [B, L, H']
    student_lm_head_weight: Tensor,  # [V, H]
    teacher_lm_head_weight: Tensor,  # [V, H']
    completion_mask: Tensor,  # [B, L]
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,  # [V]
    teacher_lm_head_bias: Tensor | None = None,  # [V]
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces `_chunked_divergence_loss`: (loss, sum of the student's entropies, number of loss tokens)."""
    student = unproject(
        student_hidden_states,
        student_lm_head_weight,
        student_lm_head_bias,
        student_logit_scale,
        student_final_logit_softcapping,
    )
    teacher = unproject(
        teacher_hidden_states,
        teacher_lm_head_weight,
        teacher_lm_head_bias,
        teacher_logit_scale,
        teacher_final_logit_softcapping,
    )
    student, teacher = student / temperature, teacher / temperature
    mask = completion_mask != 0
    values, tokens = per_token(student, teacher, float(beta), mask), mask.sum()
    with torch.no_grad():  # one more product, for a metric: `linear_distill_loss` does not return the entropy
        entropy = student.logprob(torch.where(mask, 0, IGNORED)).entropy.sum()
    return values.sum() / (tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch), entropy, tokens


def _module(trainer: Any, name: str) -> ModuleType:
    """The TRL module that defines the class of that name: its methods look up the functions they call there."""
    kinds = (kind for kind in type(trainer).__mro__ if kind.__name__ == name and kind.__module__.startswith("trl."))
    return sys.modules[next(kinds).__module__]


def _models(trainer: Any) -> list[Any]:
    """The student and the teacher without their wrappers."""
    return [_causal_lm(trainer, model) for model in (trainer.model, trainer.teacher_model)]


def _measure_heads(trainer: Any) -> tuple[OutputHead, OutputHead]:
    """The student's head and the teacher's; refuse heads that cannot be compared."""
    student, teacher = (measure_head(model) for model in _models(trainer))
    if student.softcap != teacher.softcap:
        raise ValueError(
            f"the student's logits have softcap {student.softcap}, the teacher's {teacher.softcap}; needs the same"
        )
    return student, teacher


def _causal_lm(trainer: Any, model: Any) -> Any:
    """The transformers model inside its wrappers."""
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if is_peft_model(model) else model


def _lazy(method: Callable[..., Any], heads: list[LinearHead], accelerator: Any) -> Callable[..., Any]:
    """`method` with the models' logits unprojected, under the autocast that Accelerate's wrapper would apply."""

    def lazily(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for head in heads:
                stack.enter_context(head.lazily())
            stack.enter_context(accelerator.autocast())
            return method(*args, **kwargs)

    return lazily


def _dispatched(theirs: Callable[..., Tensor], ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`ours` for `Unprojected` logits, `theirs` for real ones, which another trainer of the module may pass."""
    return lambda logits, *args, **kwargs: (ours if isinstance(logits, Unprojected) else theirs)(
        logits, *args, **kwargs
    )


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set `owner.name` to `value` inside, and restore it on exit."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


SERVED: dict[str, Callable[[Any], Replacements]] = {
    "GKDTrainer": _gkd,
    "GOLDTrainer": _gkd,
    "SDPOTrainer": _self_distillation,
    "SDFTTrainer": _self_distillation,
    "DistillationTrainer": _distillation,
}
