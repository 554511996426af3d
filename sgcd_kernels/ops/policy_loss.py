"""GRPO-family policy losses straight from hidden states, with per-token advantages.

The gradients are results of the op: the forward pass can compute them once it knows log p(y). The backward pass only
multiplies them by the incoming gradient, in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack  # a dependency of torch; in `typing` from 3.11

from sgcd_kernels.backends.registry import backend_for, no_autocast
from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection, empty_grads, indices_of, stats_dtype
from sgcd_kernels.core.registration import register
from sgcd_kernels.core.segments import Segments
from sgcd_kernels.core.statistics import LogprobValues
from sgcd_kernels.core.surrogate import PolicyMetrics, TokenInputs, surrogate_loss
from sgcd_kernels.core.validation import check_all_per_token, project_targets
from sgcd_kernels.ops.policy_inputs import PolicyOptions, PolicyTokens, Settings, check_policy_inputs


def linear_policy_loss(
    hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    advantages: Tensor,  # like targets, or [B]
    *,
    old_logp: Tensor | None = None,  # like targets
    mask: Tensor | None = None,  # like targets; true where a token has a loss
    cu_seqlens: Tensor | None = None,  # [B + 1], for packed hidden
    ref_logp: Tensor | None = None,  # like targets
    importance_weights: Tensor | None = None,  # like targets
    lse: Tensor | None = None,  # like targets
    **options: Unpack[PolicyOptions],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (a scalar, differentiable in hidden, weight and bias) and detached metrics.

    Formulas and denominators: `sgcd_kernels.core.surrogate`. Gradients are computed in the forward pass: 3 products of
    hidden and weight, and a fourth without `lse` (which the C++ backend avoids if it has room to cache the logits). So
    backward may run only once, memory beyond the gradients is bounded at any N and V, and no gradient is computed for a
    weight that does not require one.

    Keywords of the loss: loss_type (grpo, bnpo, dr_grpo, dapo, cispo, gspo), epsilon 0.2, epsilon_high, beta 0.0,
    num_items_in_batch; or `policy`, a `PolicyLossConfig` of these, whose fields the keywords override. Of the head:
    bias [V], temperature 1.0 (a number, or a tensor per token), softcap, ignore_index -100, group. Of the backend:
    impl "auto".

    - `old_logp=None` means on-policy: the ratio is 1, and its gradient is that of log p(y).
    - `epsilon_high=None` means `epsilon`. For cispo the ratio is capped at 1 + epsilon_high and has no lower bound;
      TRL's epsilon_high for cispo is the cap itself, so its 5.0 is 4.0 here.
    - `importance_weights`, such as truncated exp(trainer - engine) log-probs, multiply the policy term per token.
    - `lse` from a scoring pass over the same hidden and weight saves a product; the metric `entropy` is then absent.
      In fp32 it is off by up to |lse| 2^-24, and so is every log p: 5e-4 at 16,384. Given in fp64, it is exact.
    - `num_items_in_batch` is the divisor of the whole batch under gradient accumulation: sequences for grpo and gspo,
      tokens for bnpo, dapo and cispo, sequences x maximum length for dr_grpo.
    - Masked and ignored tokens are not computed: a NaN or a target outside the vocabulary there has no effect. With no
      other tokens, loss and gradients are 0. A NaN at a loss token makes the loss NaN.
    - Metrics, over the loss tokens: `clip_ratio/low_mean`, `high_mean`, `region_mean` (fraction of tokens whose
      gradient the clip cuts off: below, above, either), `ratio/mean`, `min`, `max`, `num_tokens`, `kl` (with beta) and
      `entropy` (without `lse`).
    - `group`: `weight` and `bias` are this rank's rows of a vocab-sharded head, targets are global ids.

    Gradients: hidden, weight, bias
    Backends: triton, cpp, torch
    Cost: 4 U forward, 0 U backward; with lse 3 U forward, 0 U backward

    Raises ValueError for shapes, dtypes, devices, targets or options that do not fit, and for grpo, gspo or dr_grpo on
    packed tokens without `cu_seqlens`.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> hidden, weight = (torch.randn(n, 4, generator=g).requires_grad_() for n in (5, 10))
    >>> targets, cu_seqlens = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 3, 5])  # two sequences
    >>> loss, metrics = linear_policy_loss(hidden, weight, targets, torch.tensor([1.0, -1.0]), cu_seqlens=cu_seqlens)
    >>> loss.backward()
    >>> metrics["num_tokens"].item(), metrics["ratio/mean"].item(), weight.grad.shape
    (5.0, 1.0, torch.Size([10, 4]))
    """
    settings = Settings.of("linear_policy_loss", weight, options)
    tokens = PolicyTokens(targets, advantages, old_logp, mask, cu_seqlens, ref_logp, importance_weights)
    check_policy_inputs(hidden, tokens, settings)
    check_all_per_token({"lse": lse}, targets.shape, hidden.device)
    result = policy_loss(hidden, tokens, settings, KnownLse(lse))
    return result.loss, result.metrics.named()


class KnownLse(NamedTuple):
    """The student's log-sum-exps from a scoring pass, like `targets`."""

    lse: Tensor | None = None  # in fp64, or rounded to fp32
    low: Tensor | None = None  # what that rounding took from it, if it is known
    known: Tensor | None = None  # bool; None is everywhere


class PolicyResult(NamedTuple):
    loss: Tensor
    metrics: PolicyMetrics
    grads: HeadGrads
    logp: Tensor  # like targets, 0 where masked
    entropy: Tensor | None  # like targets, 0 where masked or where the lse was known


def policy_loss(hidden: Tensor, tokens: PolicyTokens, settings: Settings, known: KnownLse) -> PolicyResult:
    """The op on checked inputs. Only hidden, weight and bias are differentiable."""
    if not settings.policy.has_kl:
        tokens = tokens._replace(ref_logp=None)
    plain = PolicyTokens(*(None if x is None else x.detach() for x in tokens))  # type: ignore[arg-type]
    known = KnownLse(*(None if x is None else x.detach() for x in known))
    settings = settings._replace(head=settings.head.with_constant_temperature())
    return policy_loss_op(hidden, settings, plain, known, Needs.of(hidden, settings.head))


def _fake(hidden: Tensor, settings: Settings, tokens: PolicyTokens, known: KnownLse, needs: Needs) -> PolicyResult:
    head, dtype, targets = settings.head, stats_dtype(hidden, settings.head.weight), tokens.targets

    def scalar(given: bool = True) -> Tensor | None:
        return hidden.new_empty((), dtype=dtype) if given else None

    optional = {"kl": scalar(tokens.ref_logp is not None), "entropy": scalar(known.lse is None)}
    metrics = PolicyMetrics(**{name: optional.get(name, scalar()) for name in PolicyMetrics._fields})  # type: ignore[arg-type]
    logp, entropy = (targets.new_empty(targets.shape, dtype=dtype) for _ in range(2))
    grads = empty_grads(hidden, head, needs, saved=True)
    all_known = known.lse is not None and known.known is None
    return PolicyResult(hidden.new_empty((), dtype=dtype), metrics, grads, logp, None if all_known else entropy)


def _setup(ctx: Any, result: PolicyResult, hidden: Tensor, settings: Settings, *_: object) -> None:
    # On ctx, not saved for backward: saved tensors must not be modified, and backward multiplies these in place.
    ctx.grads = result.grads
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, settings.head.weight, settings.head.bias)]


def _backward(ctx: Any, upstream: PolicyResult) -> dict[str, Tensor | None]:
    if ctx.grads is None:
        raise RuntimeError("linear_policy_loss: its gradients are computed in forward, so backward may run once")
    grads, ctx.grads = ctx.grads, None
    scaled = HeadGrads(
        *(None if g is None else scale(g, upstream.loss).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
    )
    return {"hidden": scaled.hidden, "settings_head_weight": scaled.weight, "settings_head_bias": scaled.bias}


def scale(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a 0-dimensional factor, in place, without rounding the factor to half as for a tensor.

    While torch.compile traces, out of place: the compiler fuses the product, and may reuse the memory of `gradient`.
    """
    if type(factor) is not Tensor:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return (gradient.to(wide) * factor).to(gradient.dtype)
    number = float(factor)
    return gradient if number == 1.0 else gradient.mul_(number)


@register(_fake, _setup, _backward, differentiable=("loss",))
def policy_loss_op(
    hidden: Tensor, settings: Settings, tokens: PolicyTokens, known: KnownLse, needs: Needs
) -> PolicyResult:
    leading, impl = hidden.shape[:-1], settings.impl
    x, y = project_targets(hidden, settings.head, tokens.targets, settings.ignore_index, tokens.mask)
    segments = Segments.of(leading, tokens.cu_seqlens, hidden.device)

    def per_row(values: Tensor) -> Tensor:
        return x.gather(_outside_inference(values).to(dtype=x.stats_dtype, device=hidden.device))

    def optional(values: Tensor | None) -> Tensor | None:
        return None if values is None else per_row(values.reshape(-1))

    advantages = _outside_inference(tokens.advantages).to(dtype=x.stats_dtype, device=hidden.device)
    surrogate = (
        x.gather(segments.per_token(advantages, leading)),
        segments.gather(x.rows),
        settings.policy,
        TokenInputs(*(optional(v) for v in (tokens.old_logp, tokens.ref_logp, tokens.importance_weights))),
    )
    with no_autocast(hidden.device):
        lse, low = _in_two(known, x.stats_dtype)
        values, cached = _log_probs(x, y, known.known, (optional(lse), optional(low)), needs, impl)
        assert values.logp is not None
        if any(needs):
            loss, metrics, d_logp = _with_slope(values.logp, *surrogate)
            backend = backend_for(impl, "logprob_backward", x)
            grads = backend.logprob_backward(x, y, values, LogprobValues(d_logp), needs, cached)
        else:
            loss, metrics = surrogate_loss(values.logp, *surrogate)
            grads = HeadGrads(None, None, None)
    if known.lse is None and values.entropy is not None:
        metrics = metrics._replace(entropy=values.entropy.sum() / max(values.entropy.numel(), 1))
    metrics = PolicyMetrics(*(None if value is None else value.to(loss.dtype) for value in metrics))  # type: ignore[arg-type]
    if grads.hidden is not None:
        grads = grads._replace(hidden=grads.hidden.reshape(hidden.shape))
    shape = tokens.targets.shape
    entropy = None if values.entropy is None else x.scatter(values.entropy, shape)
    return PolicyResult(loss, metrics, grads, x.scatter(values.logp, shape), entropy)


def _in_two(known: KnownLse, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The log-sum-exps rounded to the dtype of statistics, and the error of that."""
    lse, low = known.lse, known.low
    if lse is None or low is not None or torch.promote_types(lse.dtype, dtype) == dtype:
        return lse, low
    rounded = lse.to(dtype)
    return rounded, torch.where(rounded.isfinite(), lse - rounded, 0.0).to(dtype)


def _log_probs(
    x: Projection,
    y: Tensor,
    known: Tensor | None,  # bool, like `targets`
    given: tuple[Tensor | None, Tensor | None],  # lse and lse_low, [n]
    needs: Needs,
    impl: str,
) -> tuple[LogprobValues, Any]:
    """log p(y), lse, the entropy of rows whose lse was not known, and tiles cached for the gradients."""
    lse, low = given
    left = None if known is None else indices_of(x.gather(known.reshape(-1) == 0))
    if lse is None or (known is not None and left is None):
        cache_for = needs if any(needs) else None
        return backend_for(impl, "logprob_forward", x).logprob_forward(x, y, cache_for)
    logp = backend_for(impl, "target_logp", x).target_logp(x, y, lse, low)
    if left is None:
        return LogprobValues(logp, None, lse, low), None
    values = LogprobValues(logp, torch.zeros_like(lse), lse, torch.zeros_like(lse) if low is None else low)
    if left.numel():
        part = Projection(x.hidden, x.head, left if x.rows is None else x.rows[left])
        own, _ = backend_for(impl, "logprob_forward", part).logprob_forward(part, y[left])
        pairs = zip(values, own, strict=True)
        values = LogprobValues(*(total.index_copy(0, left, part) for total, part in pairs))  # type: ignore[union-attr, arg-type]
    return values, None


def _with_slope(logp: Tensor, *surrogate: Any) -> tuple[Tensor, PolicyMetrics, Tensor]:
    """(loss, metrics, d loss / d logp). The dispatcher excludes autograd inside an op; this includes it again."""
    autograd = torch._C.DispatchKey.AutogradFunctionality
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set().remove(autograd)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        logp = logp.detach().requires_grad_()
        loss, metrics = surrogate_loss(logp, *surrogate)
        (d_logp,) = torch.autograd.grad(loss, logp)
    return loss.detach(), metrics, d_logp


def _outside_inference(x: Tensor) -> Tensor:
    """`x`, or a copy of it if it was made in inference mode, which autograd cannot record."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x.detach()
