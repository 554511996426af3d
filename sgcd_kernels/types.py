"""What the ops give back, and the one description of a head that every backend takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LogprobStats(NamedTuple):
    """Per token, shaped like `targets`; fp32 (fp64 for fp64 inputs). Ignored tokens are 0 in every field."""

    logp: Tensor  # log p(y)
    entropy: Tensor  # -sum p log p, nats
    lse: Tensor  # log-sum-exp of the logits after softcap and temperature


class DivergenceStats(NamedTuple):
    """Per token, shaped like `targets`; p is the student, q the teacher. Fields that were not asked for are None."""

    student_logp: Tensor  # log p(y)
    teacher_logp: Tensor  # log q(y)
    student_entropy: Tensor  # nats
    teacher_entropy: Tensor  # nats
    student_lse: Tensor  # log-sum-exp of the logits after softcap and temperature
    teacher_lse: Tensor
    reverse_kl: Tensor  # KL(p || q)
    forward_kl: Tensor  # KL(q || p)
    bhattacharyya: Tensor  # sum sqrt(p q), in [0, 1]; squared Hellinger distance is 1 minus this
    jsd: Tensor | None = None  # beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
    tv: Tensor | None = None  # sum |p - q| / 2
    topk_reverse_kl: Tensor | None = None  # KL(p || q) over {teacher's top K, observed token, tail}
    topk_forward_kl: Tensor | None = None  # KL(q || p) over the same buckets


class Credit(NamedTuple):
    """Per token, packed [N]."""

    weights: Tensor  # W, multiplies the advantage
    saliency: Tensor  # s in [0, 1]
    span_ids: Tensor  # int64, counted through the batch; -1 outside spans


@dataclass(frozen=True)
class Projection:
    """softcap(hidden @ weight^T + bias) / temperature, on the tokens `rows`: the input of every backend."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]; this rank's shard under vocab-parallelism
    bias: Tensor | None = None  # [V]
    temperature: float | Tensor = 1.0  # or [N]
    softcap: float | None = None
    rows: Tensor | None = None  # [n] int64, the tokens to compute; None is all of them

    @property
    def num_rows(self) -> int:
        return int((self.hidden if self.rows is None else self.rows).shape[0])

    @property
    def stats_dtype(self) -> torch.dtype:
        """fp32, or fp64 when an input is fp64."""
        return torch.promote_types(torch.promote_types(self.hidden.dtype, self.weight.dtype), torch.float32)


class Logprobs(NamedTuple):
    """What a backend's `logprob_forward` gives, each [n], and what it was asked to keep for `logprob_backward`."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    kept: Any = None


class ProjectionGrads(NamedTuple):
    """Gradients in `stats_dtype` or the input's dtype; None where not asked for."""

    hidden: Tensor | None  # [N, H], zero at tokens that were not computed
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


def saved_dtype(x: Tensor) -> torch.dtype:
    """fp16 gradients stay in fp32 until the loss scale has been multiplied in."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype
