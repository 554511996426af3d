"""The arguments of the operators of csrc/, in the order of their schemas: one head, a pair, the logit transform."""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection, as_fp32, saved_dtype, sum_over


def head(x: Projection) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight, bias"""
    hidden = x.hidden.detach()
    if hidden.stride(1) != 1 or (hidden.shape[0] > 1 and hidden.stride(0) < hidden.shape[1]):
        hidden = hidden.clone(memory_format=torch.contiguous_format)  # contiguous() returns an empty tensor as is
    return hidden, x.head.weight.detach(), None if x.head.bias is None else as_fp32(x.head.bias)


def pair(student: Projection, teacher: Projection) -> tuple[Tensor | None, ...]:
    """Both heads, and the rows common to both."""
    return *head(student), *head(teacher), student.rows


def transform(x: Projection) -> tuple[Tensor | None, float]:
    """temperature, softcap"""
    return x.temperature_per_row(), x.head.softcap or 0.0


def wanted(x: Projection, needs: Needs) -> list[bool]:
    return [needs.hidden, needs.weight, needs.bias and x.head.bias is not None]


def head_grads(x: Projection, needs: Needs, grads: tuple[Tensor, Tensor, Tensor]) -> HeadGrads:
    """The operators' gradients, scattered from rows to tokens and summed over the ranks."""
    d_hidden, d_weight, d_bias = (grad if want else None for grad, want in zip(grads, wanted(x, needs), strict=True))
    if d_hidden is not None:
        d_hidden = sum_over(d_hidden, x.head.group).to(saved_dtype(x.hidden))
        if x.rows is not None:
            d_hidden = d_hidden.new_zeros(x.hidden.shape).index_copy_(0, x.rows, d_hidden)
    return HeadGrads(d_hidden, d_weight, d_bias)
