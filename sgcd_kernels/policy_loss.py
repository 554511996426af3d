"""GRPO-family policy losses straight from hidden states, with per-token advantages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from sgcd_kernels.backends import eager, no_autocast, resolve
from sgcd_kernels.divergence import on_rows
from sgcd_kernels.shard import shard_range
from sgcd_kernels.surrogate import LOSS_TYPES, PER_SEQUENCE, Segments, Surrogate, surrogate_loss
from sgcd_kernels.types import Projection
from sgcd_kernels.validation import (
    check_choice,
    check_cu_seqlens,
    check_float,
    check_targets,
    check_tensor,
    frozen,
    kept_rows,
    per_token,
    projection,
    take,
)


@eager
def linear_policy_loss(
    hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    advantages: Tensor,  # like targets, or [B]
    *,
    old_logp: Tensor | None = None,  # like targets
    mask: Tensor | None = None,  # like targets; true where a token has a loss
    cu_seqlens: Tensor | None = None,  # [B + 1], for packed hidden
    loss_type: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_logp: Tensor | None = None,  # like targets
    importance_weights: Tensor | None = None,  # like targets
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    ignore_index: int = -100,
    lse: Tensor | None = None,  # like targets
    num_items_in_batch: float | Tensor | None = None,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (a scalar, differentiable in hidden, weight and bias) and detached metrics.

    Formulas and denominators: `sgcd_kernels.surrogate`. Gradients are computed in the forward pass (3 products of
    hidden and weight, 4 without `lse`), so backward may run once and nothing of size N x V is ever held; a weight that
    does not require a gradient costs none.

    - `old_logp=None` means on-policy: ratio 1, the gradient that of the tokens' own log-probs.
    - `epsilon_high=None` means `epsilon`. For cispo the ratio is capped at 1 + epsilon_high and not from below; TRL's
      epsilon_high for cispo is the cap itself, so its 5.0 is 4.0 here.
    - `importance_weights`, e.g. truncated exp(trainer - engine) log-probs, multiply the policy term of a token.
    - `lse` from a scoring pass over the same hidden and weight saves a product; the metric `entropy` is then absent.
    - `num_items_in_batch` under gradient accumulation: what the whole batch divides by, sequences for grpo and gspo,
      tokens for bnpo, dapo and cispo, sequences x maximum length for dr_grpo.
    - Tokens that are masked or ignored are not computed: what they hold, NaN or a target that is no word, has no
      influence. With none left the loss is 0 and so are the gradients. A NaN at a loss token makes the loss NaN.
    - `group`: `weight` and `bias` are this rank's rows of a vocab-sharded head, targets are global ids.

    Raises ValueError for shapes, dtypes, devices, targets or options that do not fit, and for grpo, gspo or dr_grpo on
    packed tokens without `cu_seqlens`.
    """
    cfg = check_options(loss_type, epsilon, epsilon_high, beta, num_items_in_batch, ref_logp)
    p = projection(hidden, weight, bias, temperature, softcap)
    leading = hidden.shape[:-1]
    flat = check_targets(targets, leading, hidden.device, shard_range(weight, group)[1], ignore_index, mask)
    rows = kept_rows(flat != ignore_index)
    segments = segments_of(leading, cu_seqlens, loss_type, hidden.device)
    per_row = _PerRow(leading, hidden.device, rows, p.stats_dtype)
    call = _Call(
        p=on_rows(p, rows),
        targets=take(flat, rows),
        advantages=take(spread(advantages, segments, leading, p.stats_dtype), rows),
        old_logp=per_row("old_logp", old_logp),
        ref_logp=per_row("ref_logp", ref_logp),
        importance_weights=per_row("importance_weights", importance_weights),
        lse=per_row("lse", lse),
        segments=Segments(take(segments.ids, rows), segments.count, segments.longest),
        cfg=cfg,
        impl=impl,
        group=group,
    )
    metrics: dict[str, Tensor] = {}
    loss: Tensor = _LinearPolicyLoss.apply(p.hidden, weight, bias, call, metrics)  # type: ignore[no-untyped-call]
    return loss, metrics


class _Call:
    """The non-differentiable side of one call, on the loss tokens only."""

    def __init__(
        self,
        p: Projection,
        targets: Tensor,
        advantages: Tensor,
        old_logp: Tensor | None,
        ref_logp: Tensor | None,
        importance_weights: Tensor | None,
        lse: Tensor | None,
        segments: Segments,
        cfg: Surrogate,
        impl: str,
        group: ProcessGroup | None,
    ) -> None:
        self.p, self.targets, self.advantages, self.segments = p, targets, advantages, segments
        self.old_logp, self.ref_logp, self.importance_weights, self.lse = old_logp, ref_logp, importance_weights, lse
        self.cfg, self.impl, self.group = cfg, impl, group
        self.grad = torch.is_grad_enabled()  # inside autograd.Function.forward it is always off

    def stats(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(logp, lse, metrics)"""
        if self.lse is not None:
            logp = resolve("target_logp", self.impl, self.p)(self.p, self.targets, self.lse, self.group)
            return logp, self.lse, {}
        logp, entropy, lse = resolve("logprob_forward", self.impl, self.p)(self.p, self.targets, self.group)
        return logp, lse, {"entropy": entropy.sum() / max(entropy.numel(), 1)}

    def loss(self, logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return surrogate_loss(
            logp, self.advantages, self.segments, self.cfg, self.old_logp, self.ref_logp, self.importance_weights
        )


class _LinearPolicyLoss(torch.autograd.Function):
    """Computes the gradients in forward, because their coefficients are known as soon as log p(y) is."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, metrics: dict[str, Tensor]
    ) -> Tensor:
        needs = tuple(bool(need) and call.grad for need in ctx.needs_input_grad[:3])
        with no_autocast(hidden.device):
            logp, lse, more = call.stats()
            ctx.grads = (None, None, None)
            if any(needs):
                with torch.enable_grad():
                    logp = logp.detach().requires_grad_()
                    loss, found = call.loss(logp)
                    (d_logp,) = torch.autograd.grad(loss, logp)
                backward = resolve("logprob_backward", call.impl, call.p)
                ctx.grads = backward(call.p, call.targets, lse, d_logp, needs, group=call.group)
            else:
                loss, found = call.loss(logp)
            metrics.update(found | more)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_policy_loss: its gradients are computed in forward, so backward may run once")
        grads, ctx.grads = ctx.grads, None
        # A Python number multiplies a half tensor in fp32; a tensor would first be rounded to half itself.
        scale = float(d_loss)
        pairs = zip(grads, ctx.dtypes, strict=True)
        return (*(None if g is None else g.mul_(scale).to(dtype) for g, dtype in pairs), None, None)


class _PerRow:
    """Checks a per-token input and keeps its computed rows, detached, in the dtype of the statistics."""

    def __init__(self, leading: torch.Size, device: torch.device, rows: Tensor | None, dtype: torch.dtype) -> None:
        self.leading, self.device, self.rows, self.dtype = leading, device, rows, dtype

    def __call__(self, name: str, value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        return take(frozen(per_token(name, value, self.leading, self.device)).to(self.dtype), self.rows)


def check_options(
    loss_type: str,
    epsilon: float,
    epsilon_high: float | None,
    beta: float,
    num_items_in_batch: float | Tensor | None,
    ref_logp: Tensor | None,
) -> Surrogate:
    """The options of the loss; refuses those that do not fit."""
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_float("epsilon", epsilon, 0.0)
    check_float("beta", beta, 0.0)
    if epsilon_high is not None:
        check_float("epsilon_high", epsilon_high, 0.0)
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() == 1:  # as TRL has it
            num_items_in_batch = num_items_in_batch.item()
        check_float("num_items_in_batch", num_items_in_batch, 0.0, open_low=True)
        num_items_in_batch = float(num_items_in_batch)
    if beta != 0 and ref_logp is None:
        raise ValueError(f"ref_logp is None, needs the reference policy's log-probs for beta {beta}")
    return Surrogate(loss_type, epsilon, epsilon if epsilon_high is None else epsilon_high, beta, num_items_in_batch)


def segments_of(leading: torch.Size, cu_seqlens: Tensor | None, loss_type: str, device: torch.device) -> Segments:
    """The sequences: rows of [B, T], or the ranges of `cu_seqlens`."""
    tokens = leading.numel()
    if len(leading) == 2:
        if cu_seqlens is not None:
            raise ValueError(f"cu_seqlens is given with hidden [B, T, H], T = {leading[1]}; needs packed hidden [N, H]")
        ids = torch.arange(leading[0], device=device).repeat_interleave(leading[1])
        return Segments(ids, leading[0], leading[1])
    if cu_seqlens is None:
        if loss_type in PER_SEQUENCE:
            raise ValueError(f"cu_seqlens is None, needs [B + 1] for loss_type {loss_type!r} on packed hidden [N, H]")
        return Segments(torch.zeros(tokens, dtype=torch.long, device=device), 1, tokens)
    lengths = check_cu_seqlens(cu_seqlens, tokens).diff().to(device)
    ids = torch.arange(lengths.numel(), device=device).repeat_interleave(lengths)
    return Segments(ids, lengths.numel(), int(lengths.max()) if lengths.numel() else 0)


def spread(advantages: Tensor, segments: Segments, leading: torch.Size, dtype: torch.dtype) -> Tensor:  # [N]
    """One advantage a token, from one a token or one a sequence; detached."""
    check_tensor("advantages", advantages)
    values = frozen(advantages).to(dtype=dtype, device=segments.ids.device)
    if values.shape == leading:
        return values.reshape(-1)
    if values.shape == (segments.count,):
        return values[segments.ids]
    got, needs = list(values.shape), f"{list(leading)} (a token) or [{segments.count}] (a sequence)"
    raise ValueError(f"advantages has shape {got}, needs {needs}")
