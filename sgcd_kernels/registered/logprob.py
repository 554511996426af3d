"""sgcd::linear_logprob and its backward pass. Saves only the inputs and two numbers a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgcd_kernels.backends import no_autocast, resolve
from sgcd_kernels.registered.heads import head, on_targets, place, stats_dtype, three, three_empty
from sgcd_kernels.registered.library import register, saveable
from sgcd_kernels.shard import group_of
from sgcd_kernels.types import ProjectionGrads
from sgcd_kernels.validation import kept_rows, take


def linear_logprob(
    hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    bias: Tensor | None,
    temperatures: Tensor | None,  # instead of `temperature`: one, or one a token
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    impl: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), each like `targets`"""
    ranks = group_of(group)
    p = head(hidden, weight, bias, temperatures, temperature, softcap, None)
    p, flat = on_targets(p, targets, ignore_index, ranks)
    with no_autocast(hidden.device):
        logp, entropy, lse, _ = resolve("logprob_forward", impl, p)(p, flat, ranks)
    return place(logp, p.rows, targets.shape), place(entropy, p.rows, targets.shape), place(lse, p.rows, targets.shape)


def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(targets.new_empty(targets.shape, dtype=stats_dtype(hidden, weight)) for _ in range(3))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, temperatures, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, saveable(targets), bias, saveable(temperatures), *output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
    if d_logp is None and d_entropy is None and d_lse is None:
        return (None,) * 10
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    d_hidden, d_weight, d_bias = backward_op(*ctx.saved_tensors, d_logp, d_entropy, d_lse, *ctx.options, needs)
    x, w, b = (g if need else None for g, need in zip((d_hidden, d_weight, d_bias), needs, strict=True))
    return (x, w, None, b, *(None,) * 6)


def linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    d_logp: Tensor | None,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    impl: str,
    group: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their dtypes; empty where not needed."""
    flat = targets.reshape(-1).long()
    rows = kept_rows(flat != ignore_index)
    p = head(hidden, weight, bias, temperatures, temperature, softcap, rows)

    def chosen(x: Tensor | None) -> Tensor | None:
        return None if x is None else take(x.reshape(-1), rows)

    lse = take(lse.reshape(-1), rows)
    with no_autocast(hidden.device):
        grads = resolve("logprob_backward", impl, p)(
            p,
            take(flat, rows),
            lse,
            torch.zeros_like(lse) if d_logp is None else chosen(d_logp),
            tuple(needs),
            entropy=None if d_entropy is None else chosen(entropy),
            d_entropy=chosen(d_entropy),
            d_lse=chosen(d_lse),
            group=group_of(group),
        )
    return three(as_input_dtypes(grads, hidden, weight, bias), hidden)


def as_input_dtypes(grads: ProjectionGrads, *inputs: Tensor | None) -> ProjectionGrads:
    """Gradients in the dtype of what they belong to."""
    pairs = zip(grads, inputs, strict=True)
    return ProjectionGrads(*(g if g is None or x is None else g.to(x.dtype) for g, x in pairs))


def _fake_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = (hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype)
    return three_empty((hidden, weight, bias), dtypes, others[-1])


op: Callable[..., Any] = register(linear_logprob, _fake, _setup, _backward)
backward_op: Callable[..., Any] = register(linear_logprob_backward, _fake_backward)
