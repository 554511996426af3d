"""log p(y), entropy and log-sum-exp, and their gradients, by the operators of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.backends.cpp import arguments
from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection, as_fp32
from sgcd_kernels.core.statistics import HeadStats, LogprobValues


def logprob_forward(
    x: Projection, targets: Tensor, cache_for: Needs | None = None
) -> tuple[LogprobValues, list[Tensor] | None]:
    inputs = *arguments.head(x), x.rows, x.local_targets(targets), *arguments.transform(x)
    cached = None
    if cache_for is None:
        fields = torch.ops.sgcd_kernels.head_stats(*inputs)
    else:
        fields, cached = torch.ops.sgcd_kernels.head_stats_cached(*inputs, cache_for.weight)
    stats, _ = HeadStats(*fields).merged(x.head.group)
    return LogprobValues(*stats.results()), cached


def logprob_backward(
    x: Projection,
    targets: Tensor,
    values: LogprobValues,
    upstream: LogprobValues,
    needs: Needs,
    cached: list[Tensor] | None = None,
) -> HeadGrads:
    lse, entropy, d_entropy = values.lse, values.entropy, upstream.entropy
    assert lse is not None
    if entropy is None or d_entropy is None:
        entropy = d_entropy = None
    d_logp = torch.zeros_like(lse) if upstream.logp is None else upstream.logp
    grads = torch.ops.sgcd_kernels.logprob_grads(
        *arguments.head(x),
        x.rows,
        x.local_targets(targets),
        *arguments.transform(x),
        as_fp32(lse),
        None if values.lse_low is None else as_fp32(values.lse_low),
        as_fp32(-d_logp if upstream.lse is None else upstream.lse - d_logp),
        as_fp32(d_logp),
        None if entropy is None else as_fp32(entropy),
        None if d_entropy is None else as_fp32(d_entropy),
        arguments.wanted(x, needs),
        x.head.group is not None,
        cached or [],
    )
    return arguments.head_grads(x, needs, grads)
