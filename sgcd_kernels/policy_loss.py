"""GRPO-family policy losses straight from hidden states, with per-token advantages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.backends import IMPLS
from sgcd_kernels.registered import policy_loss as registered
from sgcd_kernels.shard import name_of
from sgcd_kernels.surrogate import LOSS_TYPES, PER_SEQUENCE
from sgcd_kernels.validation import (
    check_advantages,
    check_bounds,
    check_choice,
    check_float,
    check_head,
    check_int,
    check_per_token,
    check_targets,
    detached,
    tempering,
)


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
    temperature: float | Tensor = 1.0,  # or one a token
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
    hidden and weight; one more without `lse`, unless the C++ backend has room for the logits), so backward may run once
    and memory beyond the gradients is bounded at any N and V; a weight that does not require a gradient costs none.

    - `old_logp=None` means on-policy: ratio 1, the gradient that of the tokens' own log-probs.
    - `epsilon_high=None` means `epsilon`. For cispo the ratio is capped at 1 + epsilon_high and not from below; TRL's
      epsilon_high for cispo is the cap itself, so its 5.0 is 4.0 here.
    - `importance_weights`, e.g. truncated exp(trainer - engine) log-probs, multiply the policy term of a token.
    - `lse` from a scoring pass over the same hidden and weight saves a product; the metric `entropy` is then absent.
    - `num_items_in_batch` under gradient accumulation: what the whole batch divides by, sequences for grpo and gspo,
      tokens for bnpo, dapo and cispo, sequences x maximum length for dr_grpo.
    - Tokens that are masked or ignored are not computed: what they hold, NaN or a target that is no word, has no
      influence. With none left the loss is 0 and so are the gradients. A NaN at a loss token makes the loss NaN.
    - Metrics, over the loss tokens: `clip_ratio/low_mean`, `high_mean`, `region_mean` (share that the clip holds back:
      below, above, either), `ratio/mean`, `min`, `max`, `num_tokens`, `kl` (with beta) and `entropy` (without `lse`).
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
    check_options(loss_type, epsilon, epsilon_high, beta)
    check_batch(num_items_in_batch, beta, ref_logp)
    check_choice("impl", impl, IMPLS)
    check_int("ignore_index", ignore_index)
    leading = check_head(hidden, weight, bias, temperature, softcap)
    check_targets(targets, leading, hidden.device, mask)
    check_advantages(advantages, leading, check_sequences(leading, cu_seqlens, loss_type))
    given = {"old_logp": old_logp, "ref_logp": ref_logp, "importance_weights": importance_weights, "lse": lse}
    check_per_token(given, leading, hidden.device)
    items = num_items_in_batch
    loss, metrics, *_ = registered.op(
        hidden,
        weight,
        bias,
        targets,
        advantages.detach(),
        detached(old_logp),
        mask,
        cu_seqlens,
        detached(ref_logp),
        detached(importance_weights),
        detached(lse),
        *tempering(temperature),
        None if softcap is None else float(softcap),
        items if isinstance(items, Tensor) else None,
        None if items is None or isinstance(items, Tensor) else float(items),
        ignore_index,
        loss_type,
        float(epsilon),
        float(epsilon if epsilon_high is None else epsilon_high),
        float(beta),
        impl,
        name_of(group),
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)],
    )
    names = registered.metric_names(ref_logp is not None and beta != 0, lse is None)
    return loss, dict(zip(names, metrics.unbind(), strict=True))


def check_options(loss_type: str, epsilon: float, epsilon_high: float | None, beta: float) -> None:
    """Refuse options of the loss that do not fit, whatever the batch."""
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_float("epsilon", epsilon, 0.0)
    check_float("beta", beta, 0.0)
    if epsilon_high is not None:
        check_float("epsilon_high", epsilon_high, 0.0)


def check_batch(num_items_in_batch: float | Tensor | None, beta: float, ref_logp: Tensor | None) -> None:
    """Refuse what a batch lacks, or says of its size."""
    one = isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() == 1  # as TRL has it
    if num_items_in_batch is not None and not one:
        check_float("num_items_in_batch", num_items_in_batch, 0.0, open_low=True)
    if beta != 0 and ref_logp is None:
        raise ValueError(f"ref_logp is None, needs the reference policy's log-probs for beta {beta}")


def check_sequences(leading: torch.Size, cu_seqlens: Tensor | None, loss_type: str) -> int:
    """Refuse bounds that are missing, or given beside [B, T, H]; give the number of sequences."""
    if len(leading) == 2:
        if cu_seqlens is not None:
            raise ValueError(f"cu_seqlens is given with hidden [B, T, H], T = {leading[1]}; needs packed hidden [N, H]")
        return leading[0]
    if cu_seqlens is None:
        if loss_type in PER_SEQUENCE:
            raise ValueError(f"cu_seqlens is None, needs [B + 1] for loss_type {loss_type!r} on packed hidden [N, H]")
        return 1
    check_bounds(cu_seqlens)
    return cu_seqlens.numel() - 1
