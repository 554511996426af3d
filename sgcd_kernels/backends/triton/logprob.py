"""log p(y), entropy and log-sum-exp, and the gradient of the logits, one tile at a time.

A program of the forward kernel takes one tile of tokens and one vocab split. It makes the logits tile by tile and keeps
running statistics of them in registers. The backward kernel makes the logits of a vocab chunk again and writes their
gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgcd_kernels.backends.torch import logprob as plain
from sgcd_kernels.backends.triton import launch
from sgcd_kernels.backends.triton.gradients import Write, loss_scale_of, sweep_gradients
from sgcd_kernels.backends.triton.tiles import (
    INFINITY,
    LOWEST,
    MIN_EXPONENT,
    HeadPlaces,
    any_nan,
    any_target,
    exp_ftz,
    grouped_order,
    head_logits,
    hidden_rows,
    load_column,
    load_temperature,
    minus_lse,
    own_targets,
    rescaled,
    store_logit_grad,
    store_statistic,
    target_logits,
    transform_backward,
)
from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection, as_fp32
from sgcd_kernels.core.statistics import MIN_EXPONENT as MIN_LOGP
from sgcd_kernels.core.statistics import HeadStats, LogprobValues


def logprob_forward(
    x: Projection, targets: Tensor, cache_for: Needs | None = None
) -> tuple[LogprobValues, None]:  # nothing is cached: beside fast products, memory is slow
    splits = HeadStats.of_splits(head_stats(x, x.local_targets(targets)))
    stats, _ = splits.merged(x.head.group)
    return LogprobValues(*stats.results()), None


def logprob_backward(
    x: Projection,
    targets: Tensor,
    values: LogprobValues,
    upstream: LogprobValues,
    needs: Needs,
    cached: None = None,
) -> HeadGrads:
    lse, entropy, d_entropy = values.lse, values.entropy, upstream.entropy
    assert lse is not None
    if entropy is None or d_entropy is None:
        entropy = d_entropy = None
    d_logp = torch.zeros_like(lse) if upstream.logp is None else upstream.logp
    scale = -d_logp if upstream.lse is None else upstream.lse - d_logp
    coefficients = [as_fp32(c) for c in (scale, d_logp, d_entropy) if c is not None]
    loss_scale = loss_scale_of(x, coefficients)
    if loss_scale is not None:
        coefficients = [c * loss_scale for c in coefficients]
    scale, d_logp, *rest = coefficients
    entropy, d_entropy = None if entropy is None else as_fp32(entropy), rest[0] if rest else None
    # Here, because expm1 in the kernel would spill: of a nearly certain target, 1 - p would be rounding error.
    logp = plain.target_logp(x, targets, lse, values.lse_low) if values.logp is None else values.logp
    logp = as_fp32(logp).clamp(min=MIN_LOGP)
    slope = scale + d_logp
    if entropy is not None and d_entropy is not None:
        slope = slope - d_entropy * (logp + entropy)
    at_target = logp.exp() * slope - logp.expm1() * d_logp
    low = None if values.lse_low is None else as_fp32(values.lse_low)
    per_token = PerToken(x.local_targets(targets), as_fp32(lse), low, scale, at_target, entropy, d_entropy)

    def writer(part: Projection, tokens: slice) -> Write:
        return _logit_grad_writer(part, PerToken._make(None if v is None else v[tokens] for v in per_token))

    return sweep_gradients(x, needs, writer, loss_scale)


def head_stats(x: Projection, targets: Tensor) -> Tensor:  # [splits, 4, n]
    """m, rest, s and the target's logit of each vocab split. Targets are rows of this rank's weight."""
    head = launch.Head.of(x)
    config = launch.config_of("head_stats", x, head)
    sizes = launch.forward_sizes(x, config, head)
    out = x.hidden.new_empty((sizes.num_splits, 4, sizes.n), dtype=torch.float32)
    if sizes.n:
        launch.variant(head_stats_kernel, head)[sizes.grid](
            **head.places(), rows=x.rows, transform=launch.transform(x, head), targets=targets, out=out,
            **sizes._asdict(), META=launch.meta(config, sizes.vocab, head), **launch.options(config),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=launch.SIZES)
def head_stats_kernel(
    hidden, hidden_stride, weight, weight_stride, width,
    rows, transform, targets, out,
    n, vocab, vocab_per_split, token_tiles, num_splits, group_n, META: tl.constexpr,
):  # fmt: skip
    """out[split] = m, rest, s, target logit: m = max z, rest = sum e^(z - m) - 1, s = sum e^(z - m) (z - m)."""
    head = HeadPlaces(hidden, hidden_stride, weight, weight_stride, width)
    tile, split = grouped_order(token_tiles, num_splits, group_n)
    BLOCK_N: tl.constexpr = META.BLOCK_N
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x = hidden_rows(head, rows, token, n)
    target = own_targets(targets, token, n, vocab)
    temperature = load_temperature(transform, token, n)
    zeros = tl.zeros((BLOCK_N,), tl.float32)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    rest, s, target_z = zeros - 1.0, zeros, zeros
    first = split * vocab_per_split
    stop = tl.minimum(first + vocab_per_split, vocab)
    for first_id in tl.range(first, stop, META.BLOCK_V, flatten=META.FLATTEN):
        vocab_ids = first_id + tl.arange(0, META.BLOCK_V)
        z = head_logits(x, head, vocab_ids, vocab, transform, temperature, META)
        if any_target(target, first_id, META.BLOCK_V):
            target_z += target_logits(z, vocab_ids, target)
        new_m = tl.maximum(m, tl.max(z, 1))
        rest, s, _ = rescaled(m, rest, s, new_m)
        m = new_m
        tile_l, tile_s = sum_tile(z, m, META.GUARDED)
        if not META.GUARDED:  # noqa: SIM102  # a constant: what is left out is not compiled
            if any_nan(tile_s):
                tile_l, tile_s = sum_tile(z, m, True)
        rest += tile_l
        s += tile_s
    store_statistic(out, split, 0, token, m, n, 4)
    store_statistic(out, split, 1, token, rest, n, 4)
    store_statistic(out, split, 2, token, s, n, 4)
    store_statistic(out, split, 3, token, target_z, n, 4)


@triton.jit
def sum_tile(z, m, GUARD: tl.constexpr):
    """l and s of one tile around a given maximum."""
    if GUARD:
        z = tl.where(z == -INFINITY, LOWEST, z)
    centred = z - m[:, None]
    e = exp_ftz(centred)
    if GUARD:
        centred = tl.where(e > 0, centred, 0.0)
    return tl.sum(e, 1), tl.sum(e * centred, 1)


class PerToken(NamedTuple):
    """What the gradient of the logits takes per token, [n]."""

    targets: Tensor  # rows of this rank's weight
    lse: Tensor
    lse_low: Tensor | None
    scale: Tensor  # d_lse - d_logp
    at_target: Tensor  # the gradient of the target's logit
    entropy: Tensor | None
    d_entropy: Tensor | None


def _logit_grad_writer(x: Projection, per_token: PerToken) -> Write:
    """What fills dZ of these tokens."""
    head = launch.Head.of(x)
    config = launch.config_of("logprob_grad", x, head)
    kernel, transform = launch.variant(logprob_grad_kernel, head), launch.transform(x, head)

    def write(first_id: int, out: Tensor) -> None:
        sizes = launch.chunk_sizes(x, first_id, out.shape[1], config, head)
        kernel[sizes.grid](
            **head.places(), rows=x.rows, transform=transform, per_token=per_token, out=out, out_stride=out.stride(0),
            **sizes._asdict(), META=launch.meta(config, sizes.chunk, head), **launch.options(config),
        )  # fmt: skip

    return write


@triton.jit(do_not_specialize=launch.SIZES)
def logprob_grad_kernel(
    hidden, hidden_stride, weight, weight_stride, width,
    rows, transform, per_token, out, out_stride,
    n, vocab, first_id, chunk, token_tiles, vocab_tiles, group_n, META: tl.constexpr,
):  # fmt: skip
    """p (scale - d_entropy (ln p + entropy)), but `at_target` at the target."""
    head = HeadPlaces(hidden, hidden_stride, weight, weight_stride, width)
    BLOCK_N: tl.constexpr = META.BLOCK_N
    tile, block = grouped_order(token_tiles, vocab_tiles, group_n)
    token, column = tile * BLOCK_N + tl.arange(0, BLOCK_N), block * META.BLOCK_V + tl.arange(0, META.BLOCK_V)
    vocab_ids, tile_first_id = first_id + column, first_id + block * META.BLOCK_V
    temperature = load_temperature(transform, token, n)
    x = hidden_rows(head, rows, token, n)
    z = head_logits(x, head, vocab_ids, vocab, transform, temperature, META)
    log_p = minus_lse(z, per_token.lse, per_token.lse_low, token, n)
    log_p = tl.where(log_p < MIN_EXPONENT, MIN_EXPONENT, log_p)  # not a maximum, which would lose a NaN
    slope = load_column(per_token.scale, token, n)
    if per_token.d_entropy is not None:
        d_entropy, entropy = load_column(per_token.d_entropy, token, n), load_column(per_token.entropy, token, n)
        slope = slope - d_entropy * (log_p + entropy)
    dz = exp_ftz(log_p) * slope
    target = tl.load(per_token.targets + token, mask=token < n, other=-1)
    if any_target(target, tile_first_id, META.BLOCK_V):
        dz = tl.where(vocab_ids[None, :] == target[:, None], load_column(per_token.at_target, token, n), dz)
    dz = transform_backward(dz, z, transform.softcap, temperature)
    store_logit_grad(out, out_stride, dz, token, column, n, chunk, META.DIVISIBLE_V)
