"""sgcd::linear_policy_loss. Its gradients are results of the forward pass, and backward multiplies them where they lie.

They are computed there because their coefficients are known as soon as log p(y) is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgcd_kernels.backends import no_autocast, resolve
from sgcd_kernels.registered.heads import head, on_targets, stats_dtype, three, three_empty
from sgcd_kernels.registered.library import register
from sgcd_kernels.registered.sequences import segments_of, spread
from sgcd_kernels.shard import group_of
from sgcd_kernels.surrogate import Segments, Surrogate, surrogate_loss
from sgcd_kernels.types import ProjectionGrads, saved_dtype
from sgcd_kernels.validation import check_float, frozen, take

CLIP_METRICS = tuple(f"clip_ratio/{part}_mean" for part in ("low", "high", "region"))


def metric_names(kl: bool, entropy: bool) -> list[str]:
    """What the op's metrics mean, in their order."""
    names = [*CLIP_METRICS, "ratio/mean", "ratio/min", "ratio/max", "num_tokens"]
    return names + ["kl"] * kl + ["entropy"] * entropy


def linear_policy_loss(
    hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,
    targets: Tensor,  # [N] or [B, T]
    advantages: Tensor,  # like targets, or [B]
    old_logp: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,  # [B + 1]
    ref_logp: Tensor | None,
    importance_weights: Tensor | None,
    lse: Tensor | None,
    temperatures: Tensor | None,  # instead of `temperature`: one, or one a token
    temperature: float,
    softcap: float | None,
    items: Tensor | None,  # instead of `num_items_in_batch`
    num_items_in_batch: float | None,
    ignore_index: int,
    loss_type: str,
    epsilon: float,
    epsilon_high: float,
    beta: float,
    impl: str,
    group: str,
    needs: list[bool],  # of hidden, weight and bias: whether to compute its gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, gradients of hidden, weight and bias: empty where not needed)"""
    ranks, leading = group_of(group), hidden.shape[:-1]
    if items is not None:
        check_float("num_items_in_batch", items.item(), 0.0, open_low=True)
        num_items_in_batch = float(items)
    cfg = Surrogate(loss_type, epsilon, epsilon_high, beta, num_items_in_batch)
    p = head(hidden, weight, bias, temperatures, temperature, softcap, None)
    p, chosen = on_targets(p, targets, ignore_index, ranks, mask)
    segments = segments_of(leading, cu_seqlens, hidden.device)

    def per_row(value: Tensor | None) -> Tensor | None:
        return None if value is None else take(frozen(value).reshape(-1).to(p.stats_dtype), p.rows)

    given: tuple[Any, ...] = (
        take(spread(advantages, segments, leading, p.stats_dtype), p.rows),
        Segments(take(segments.ids, p.rows), segments.count, segments.longest),
        cfg,
        *(per_row(value) for value in (old_logp, ref_logp, importance_weights)),
    )
    with no_autocast(hidden.device):
        lse, more, kept = per_row(lse), {}, None
        if lse is None:
            keep = tuple(needs) if any(needs) else None
            logp, entropy, lse, kept = resolve("logprob_forward", impl, p)(p, chosen, ranks, keep)
            more["entropy"] = entropy.sum() / max(entropy.numel(), 1)
        else:
            logp = resolve("target_logp", impl, p)(p, chosen, lse, ranks)
        if any(needs):
            loss, found, d_logp = _slope(logp, *given)
            backward = resolve("logprob_backward", impl, p)
            grads = backward(p, chosen, lse, d_logp, tuple(needs), group=ranks, kept=kept)
        else:
            loss, found = surrogate_loss(logp, *given)
            grads = ProjectionGrads(None, None, None)
    found |= more
    metrics = torch.stack([found[name].to(loss.dtype) for name in metric_names("kl" in found, "entropy" in found)])
    return loss, metrics, *three(grads, hidden)


def _slope(logp: Tensor, *given: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(loss, metrics, gradient of the loss in logp). Inside an op the dispatcher leaves autograd out: ask for it."""
    autograd = torch._C.DispatchKey.AutogradFunctionality
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set().remove(autograd)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        logp = logp.detach().requires_grad_()
        loss, metrics = surrogate_loss(logp, *given)
        (d_logp,) = torch.autograd.grad(loss, logp)
    return loss.detach(), metrics, d_logp


def _saved_dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, ...]:
    return saved_dtype(hidden), saved_dtype(weight), stats_dtype(hidden, weight)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logp: Tensor | None,
    importance_weights: Tensor | None,
    lse: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    *_, beta, _, _, needs = others
    names = metric_names(ref_logp is not None and beta != 0, lse is None)
    dtype = stats_dtype(hidden, weight)
    loss, metrics = hidden.new_empty((), dtype=dtype), hidden.new_empty(len(names), dtype=dtype)
    return loss, metrics, *three_empty((hidden, weight, bias), _saved_dtypes(hidden, weight), needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # On ctx, not saved for backward: what is saved must not be written to, and backward shall write to these.
    ctx.grads = ProjectionGrads(*(g if need else None for g, need in zip(output[2:], inputs[-1], strict=True)))
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if d_loss is None:
        return (None,) * 24
    if ctx.grads is None:
        raise RuntimeError("linear_policy_loss: its gradients are computed in forward, so backward may run once")
    grads, ctx.grads = ctx.grads, None
    scaled = (None if g is None else scale(g, d_loss).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
    return (*scaled, *(None,) * 21)


def scale(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient times a 0-dimensional factor that is not rounded to half first, as it would be as a tensor; in place.

    While torch.compile traces, the same as a product that it can put into one kernel and write where `gradient` was.
    """
    if type(factor) is not Tensor:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return (gradient.to(wide) * factor).to(gradient.dtype)
    number = float(factor)
    return gradient if number == 1.0 else gradient.mul_(number)


op: Callable[..., Any] = register(linear_policy_loss, _fake, _setup, _backward)
