"""sgcd::linear_distill_loss and its backward pass. Saves the inputs and three numbers a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgcd_kernels.backends import no_autocast, resolve
from sgcd_kernels.registered.heads import head, place, stats_dtype, three, three_empty
from sgcd_kernels.registered.library import register, saveable
from sgcd_kernels.registered.logprob import as_input_dtypes
from sgcd_kernels.shard import group_of
from sgcd_kernels.types import Projection
from sgcd_kernels.validation import kept_rows, take


def linear_distill_loss(
    hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,
    teacher_hidden: Tensor,  # [N, H'] or [B, T, H']
    teacher_weight: Tensor | None,  # [V, H']; None is the student's
    teacher_bias: Tensor | None,
    mask: Tensor | None,  # [N] or [B, T]
    temperatures: Tensor | None,  # instead of `temperature`: one, or one a token
    temperature: float,
    softcap: float | None,
    kind: str,
    beta: float,
    reduction: str,
    impl: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, and of each token for the backward pass: the gradient's centre, the student's lse and the teacher's)"""
    heads = _heads(
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, temperatures, temperature, softcap
    )
    rows = heads[0].rows
    features, ranks = ("jsd", "mixture_kl") if kind == "jsd" else (), group_of(group)
    if ranks:
        resolve("sharded_distill_backward", impl, *heads)  # what backward cannot do is refused here already
    unused = torch.zeros(heads[0].num_rows, dtype=torch.long, device=hidden.device)
    with no_autocast(hidden.device):
        forward = resolve("sharded_divergence_forward" if ranks and features else "divergence_forward", impl, *heads)
        fields = forward(*heads, unused, features, beta, None, ranks)
    values: Tensor = fields[kind]
    centre = fields["mixture_kl" if kind == "jsd" else kind]
    per_token = [place(x, rows, hidden.shape[:-1]) for x in (centre, fields["student_lse"], fields["teacher_lse"])]
    if reduction == "none":
        return (place(values, rows, hidden.shape[:-1]).clone(), *per_token)  # type: ignore[return-value]
    total = values.sum()
    return (total if reduction == "sum" else total / max(values.numel(), 1), *per_token)  # type: ignore[return-value]


def _heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Projection, Projection]:
    rows = None if mask is None else kept_rows(mask.reshape(-1) != 0)
    teacher_weight = weight if teacher_weight is None else teacher_weight
    student = head(hidden, weight, bias, temperatures, temperature, softcap, rows)
    return student, head(teacher_hidden, teacher_weight, teacher_bias, temperatures, temperature, softcap, rows)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    dtype = stats_dtype(hidden, weight, teacher_hidden, weight if teacher_weight is None else teacher_weight)
    leading = hidden.shape[:-1]
    per_token = (hidden.new_empty(leading, dtype=dtype) for _ in range(3))
    return hidden.new_empty(leading if others[-3] == "none" else (), dtype=dtype), *per_token


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # All tensors, the teacher's too: autograd then notices one that changes before backward, and may offload them.
    frozen_side = (saveable(x) for x in inputs[3:8])
    ctx.save_for_backward(*inputs[:3], *frozen_side, *output[1:])
    ctx.options = inputs[8:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if d_loss is None:
        return (None,) * 15
    needs = list(ctx.needs_input_grad[:3])
    grads = backward_op(*ctx.saved_tensors, d_loss, *ctx.options, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 12)


def linear_distill_loss_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    centre: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    d_loss: Tensor,
    temperature: float,
    softcap: float | None,
    kind: str,
    beta: float,
    reduction: str,
    impl: str,
    group: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their dtypes; empty where not needed."""
    heads = _heads(
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, temperatures, temperature, softcap
    )
    rows, n = heads[0].rows, heads[0].num_rows
    at, *lse = (take(x.reshape(-1), rows) for x in (centre, student_lse, teacher_lse))
    if reduction == "none":
        d_value = take(d_loss.reshape(-1), rows)
    else:
        d_value = (d_loss if reduction == "sum" else d_loss / max(n, 1)).expand(n)
    with no_autocast(hidden.device):
        given = (*heads, kind, beta, tuple(lse), at, d_value, tuple(needs))
        if ranks := group_of(group):
            grads = resolve("sharded_distill_backward", impl, *heads)(*given, ranks)
        else:
            grads = resolve("distill_backward", impl, *heads)(*given)
    return three(as_input_dtypes(grads, hidden, weight, bias), hidden)


def _fake_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    dtypes = (hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype)
    return three_empty((hidden, weight, bias), dtypes, others[-1])


op: Callable[..., Any] = register(linear_distill_loss, _fake, _setup, _backward)
backward_op: Callable[..., Any] = register(linear_distill_loss_backward, _fake_backward)
