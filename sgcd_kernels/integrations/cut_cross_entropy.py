"""A drop-in for `cut_cross_entropy`: cross-entropy from hidden states, without gradient filtering.

from sgcd_kernels.integrations.cut_cross_entropy import LinearCrossEntropy, linear_cross_entropy

Names, order and meaning of the arguments are those of cut-cross-entropy 25.9 (before 25.6 there was no bias, and the
fourth argument was `ignore_index`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any, Literal, overload

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sgcd_kernels.backends.protocol import IMPLS
from sgcd_kernels.core.lm_head import LMHead, shard_range
from sgcd_kernels.core.validation import check_choice, check_int, check_tensor
from sgcd_kernels.ops.logprob import linear_logprob

REDUCTIONS = ("mean", "sum", "none")
FILTERS = ("auto", "high")
# The original's kernels. They differ in rounding and in which gradients they drop; here each means "auto".
THEIR_IMPLS = (
    "cce",
    "torch_compile",
    "cce_exact",
    "cce_kahan_full",
    "cce_kahan_full_c",
    "cce_kahan_full_e",
    "cce_kahan_full_c_full_e",
)


@dataclass
class VocabParallelOptions:
    """Which rows of the classifier this rank holds; the original's class of this name is accepted as well."""

    start: int
    stop: int
    group: ProcessGroup | None = None  # None is the default group
    reduce_e_grad: bool = True

    @classmethod
    def from_vocab(
        cls, vocab_size: int, group: ProcessGroup | None = None, reduce_e_grad: bool = True
    ) -> VocabParallelOptions:
        """An even split: the first vocab_size % ranks of them hold one row more."""
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        rows, more = divmod(vocab_size, ranks)
        start = rank * rows + min(rank, more)
        return cls(start, start + rows + (rank < more), group, reduce_e_grad)


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    shift: bool | int = ...,
    return_lse: Literal[False] = ...,
    **others: Any,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    shift: bool | int = ...,
    *,
    return_lse: Literal[True],
    **others: Any,
) -> tuple[Tensor, Tensor]: ...
def linear_cross_entropy(  # type: ignore[misc]  # the overloads spell only what the result depends on
    e: Tensor,  # [..., H]
    c: Tensor,  # [V, H], or this rank's rows
    targets: Tensor,  # [...]
    bias: Tensor | None = None,  # [V], or this rank's
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | Enum = "auto",
    vocab_parallel_options: VocabParallelOptions | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """-log softmax(softcap(e c^T + bias))[targets] in fp32, per token or reduced over the tokens not ignored.

    - `shift` n (True is 1): position i predicts target i + n. With reduction "none" the result has the shape of
      `targets` minus n columns; ignored tokens give 0. The mean over no tokens is NaN, as PyTorch's.
    - `return_lse`: (loss, log-sum-exp per token), the second shaped as the loss with reduction "none", 0 where
      ignored, and differentiable.
    - `filter_eps`, `filter_e_grad`, `filter_c_grad`, `accum_e_fp32`, `accum_c_fp32` are accepted and ignored.
      They trade accuracy for speed in the original's kernels; here no gradient is dropped.
    - `impl`: a backend of this library. The original's names (strings or enum members) mean "auto".
    - `vocab_parallel_options`: `c` and `bias` are the rows [start, stop) of a head that the group's ranks hold in rank
      order; targets are global vocab ids. The gradient of `e` is summed over the ranks.

    Raises ValueError as `linear_logprob` does, and for a shift below 0 or not below the number of columns, a
    `filter_eps` that is neither a number nor one of the original's names, vocab-parallel options that do not fit `c` or
    the order of the ranks, and `reduce_e_grad=False`, which the op has no form for.

    >>> import torch
    >>> e, c, targets = torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([3, 5])
    >>> round(linear_cross_entropy(e, c, targets).item(), 4)  # ln 8
    2.0794
    """
    check_choice("reduction", reduction, REDUCTIONS)
    _check_filter(filter_eps)
    _check_bias(bias)
    e, targets = _shifted(e, targets, shift)
    stats = linear_logprob(
        e.reshape(targets.numel(), e.shape[-1]),
        c,
        targets.reshape(-1),
        bias=bias,
        softcap=softcap,
        ignore_index=ignore_index,
        impl=_impl(impl),
        group=_group(c, vocab_parallel_options),
    )
    loss = -stats.logp.reshape(targets.shape)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (targets != ignore_index).sum()
    return (loss, stats.lse.reshape(targets.shape)) if return_lse else loss


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` with its options fixed; arguments as the original's module."""

    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        shift: bool | int = 0,
        filter_eps: float | str | None = "auto",
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
        impl: str | Enum = "auto",
        return_lse: bool = False,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        _check_filter(filter_eps)
        self.ignore_index, self.softcap, self.reduction = ignore_index, softcap, reduction
        self.shift, self.return_lse, self.impl = shift, return_lse, _impl(impl)

    def forward(
        self,
        e: Tensor,  # [..., H]
        c: Tensor,  # [V, H]
        targets: Tensor,  # [...]
        bias: Tensor | None = None,  # [V]
    ) -> Tensor | tuple[Tensor, Tensor]:
        result: Tensor | tuple[Tensor, Tensor] = linear_cross_entropy(
            e,
            c,
            targets,
            bias,
            self.ignore_index,
            self.softcap,
            self.reduction,
            self.shift,
            return_lse=self.return_lse,  # type: ignore[call-overload]
            impl=self.impl,
        )
        return result


def _check_bias(bias: object) -> None:
    if bias is not None and not isinstance(bias, Tensor):
        hint = "; the fourth argument has been bias since cut-cross-entropy 25.6: give ignore_index by name"
        raise ValueError(f"bias is {bias!r}, needs a tensor or None{hint if isinstance(bias, int) else ''}")


def _check_filter(filter_eps: object) -> None:
    if isinstance(filter_eps, str):
        check_choice("filter_eps", filter_eps, FILTERS)
    elif filter_eps is not None and not isinstance(filter_eps, Real):
        raise ValueError(f"filter_eps is {filter_eps!r}, needs a number, 'auto', 'high' or None")


def _impl(impl: str | Enum) -> str:
    name = impl.name.lower() if isinstance(impl, Enum) else impl
    check_choice("impl", name, (*IMPLS, *THEIR_IMPLS))
    return "auto" if name in THEIR_IMPLS else name


def _shifted(e: Tensor, targets: Tensor, shift: bool | int) -> tuple[Tensor, Tensor]:
    """The positions that predict a token, and the tokens that they predict."""
    check_tensor("e", e)
    check_tensor("targets", targets)
    if e.dim() < 2 or e.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets has shape {list(targets.shape)}, needs {list(e.shape[:-1])} to fit e {list(e.shape)}"
        )
    steps = int(shift) if isinstance(shift, bool) else shift
    check_int("shift", steps, 0, max(targets.shape[-1] - 1, 0))
    columns = targets.shape[-1] - steps
    return e[..., :columns, :], targets[..., steps:]


def _group(c: Tensor, options: VocabParallelOptions | None) -> ProcessGroup | None:
    """The process group of the options, checked against this rank's rows."""
    if options is None:
        return None
    if not getattr(options, "reduce_e_grad", True):
        raise ValueError("vocab_parallel_options.reduce_e_grad is False, needs True: the op sums the gradient of e")
    check_tensor("c", c)
    group = dist.group.WORLD if options.group is None else options.group
    start = shard_range(LMHead(c, group=group))[0]
    if (options.start, options.stop) != (start, start + c.shape[0]):
        got, needs = f"[{options.start}, {options.stop})", f"[{start}, {start + c.shape[0]})"
        raise ValueError(f"vocab_parallel_options are rows {got}, need {needs}: c's rows, in the order of the ranks")
    return group
