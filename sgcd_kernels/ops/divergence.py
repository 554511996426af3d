"""Per-token divergences between a student and a teacher distribution, without the logits of either."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.backends.protocol import IMPLS, DivergenceOptions
from sgcd_kernels.backends.registry import backend_for, no_autocast
from sgcd_kernels.core.lm_head import LMHead, Projection, shard_range, stats_dtype
from sgcd_kernels.core.registration import register
from sgcd_kernels.core.validation import (
    check_beside,
    check_beta,
    check_choice,
    check_int,
    check_pair,
    check_targets,
    check_tensor,
    checked_head,
    project_targets,
    shown,
)

FEATURES = ("jsd", "tv")


class DivergenceStats(NamedTuple):
    """Per token, shaped like `targets`; p is the student, q the teacher. Fields that were not requested are None."""

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


def linear_divergence(
    student_hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    teacher_hidden: Tensor,  # [N, H'] or [B, T, H']
    teacher_weight: Tensor | None = None,  # [V, H']
    *,
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or per token
    softcap: float | None = None,
    ignore_index: int = -100,
    features: Sequence[str] = (),
    beta: float = 0.5,
    top_k: int | None = None,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> DivergenceStats:
    """Full-vocabulary KL both ways, Bhattacharyya coefficient, log-probs, entropies and normalisers of p and q.

    p is the student, q the teacher. Without `teacher_weight` the teacher uses the student's head (and its bias, unless
    `teacher_bias` is given). Softcap and then temperature apply once to both. Results are shaped like `targets`, fp32
    (fp64 for fp64 inputs), and never carry a gradient; ignored targets give 0.

    With the running A_p = sum e^{z_p - m_p} (z_p - z_q) and A_q likewise, KL(p || q) = A_p / l_p - (lse_p - lse_q) and
    KL(q || p) = (lse_p - lse_q) - A_q / l_q, where l = sum e^{z - m}. Differences of logits are summed, so that small
    divergences keep their digits and identical distributions give exactly 0. Every divergence is clamped to >= 0.

    `features` may name "jsd" (Jensen-Shannon with weight `beta` on the teacher, as GKD, arXiv 2306.13649, beta in
    [1e-6, 1 - 1e-6]) and "tv". `top_k` adds the KLs over the teacher's K most likely vocab ids, the observed token and
    one bucket for all others (SDPO, arXiv 2601.20802); up to rounding they never exceed the full KLs. Any of these
    needs a second pass, one for all of them.

    A NaN or +inf logit makes the results of its token NaN, and of no other. A logit of -inf is a vocab id of
    probability 0. If both heads have it, it adds nothing; if only q has it, reverse_kl is +inf; if only p has it,
    forward_kl is +inf. The top-K KL in that direction is +inf too if the vocab id has its own bucket. With a softcap c
    no logit is infinite: an infinite bias gives -c or c.

    `group`: both weights (and biases) are this rank's rows of vocab-sharded heads, targets are global ids; every rank
    gets the full result.

    Gradients: none
    Backends: triton, cpp, torch
    Cost: 2 U forward, 0 U backward; with features or top_k 4 U forward, 0 U backward

    Raises ValueError for shapes, dtypes, devices, targets, options or temperatures that do not fit.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> student, teacher, weight = (torch.randn(n, 4, generator=g) for n in (3, 3, 10))
    >>> targets = torch.tensor([1, 5, 9])
    >>> stats = linear_divergence(student, weight, targets, teacher, features=("tv",))
    >>> stats.reverse_kl.shape, bool((stats.reverse_kl > 0).all()), bool((stats.tv < 1).all()), stats.jsd
    (torch.Size([3]), True, True, None)
    >>> linear_divergence(student, weight, targets, student).reverse_kl.tolist()  # not merely small
    [0.0, 0.0, 0.0]
    """
    if isinstance(features, str):
        raise ValueError(f"features is {features!r}, a string; needs a sequence of names, such as ({features!r},)")
    if not isinstance(features, (Sequence, Set)):  # an iterator would be empty when it is read again
        raise ValueError(f"features is {shown(features)}, needs a sequence of names, such as ('jsd',)")
    for feature in features:
        check_choice("features", feature, FEATURES)
    check_beta(beta, "jsd" in features)
    check_tensor("student_hidden", student_hidden)
    check_beside("beta", beta, "student_hidden", student_hidden)
    check_choice("impl", impl, IMPLS)
    check_int("ignore_index", ignore_index)
    head = LMHead(weight, bias, softcap, temperature, group)
    teacher = teacher_head(head, teacher_weight, teacher_bias)
    leading = check_pair(student_hidden, head, teacher_hidden, teacher)
    check_targets(targets, leading, student_hidden.device)
    if top_k is not None:  # a shard's V is known inside the op
        check_int("top_k", top_k, 1, weight.shape[0] if group is None else math.inf)
    options = DivergenceOptions(tuple(name for name in FEATURES if name in features), beta, top_k)
    with torch.no_grad():
        return divergence_op(student_hidden, head, teacher_hidden, teacher, targets, ignore_index, options, impl).stats


class Divergence(NamedTuple):
    stats: DivergenceStats
    student_lse_low: Tensor  # what rounding took from stats.student_lse


def teacher_head(head: LMHead, weight: Tensor | None, bias: Tensor | None) -> LMHead:
    """The teacher's head: without a weight it is the student's, with the student's bias unless the teacher has one."""
    own_bias = head.bias if weight is None and bias is None else bias
    return LMHead(head.weight if weight is None else weight, own_bias, head.softcap, head.temperature, head.group)


def _given(options: DivergenceOptions) -> list[str]:
    """The names of the fields of DivergenceStats that a call computes."""
    absent = {name for name in FEATURES if name not in options.features}
    if options.top_k is None:
        absent |= {"topk_reverse_kl", "topk_forward_kl"}
    return [name for name in DivergenceStats._fields if name not in absent]


def _fake(
    student_hidden: Tensor,
    head: LMHead,
    teacher_hidden: Tensor,
    teacher: LMHead,
    targets: Tensor,
    ignore_index: int,
    options: DivergenceOptions,
    impl: str,
) -> Divergence:
    dtype = stats_dtype(student_hidden, head.weight, teacher_hidden, teacher.weight)
    fields = {name: targets.new_empty(targets.shape, dtype=dtype) for name in _given(options)}
    return Divergence(DivergenceStats(**fields), targets.new_empty(targets.shape, dtype=dtype))


@register(_fake)
def divergence_op(
    student_hidden: Tensor,
    head: LMHead,
    teacher_hidden: Tensor,
    teacher: LMHead,
    targets: Tensor,
    ignore_index: int,
    options: DivergenceOptions,
    impl: str,
) -> Divergence:
    check_beta(options.beta, "jsd" in options.features)
    student, y = project_targets(student_hidden, head, targets, ignore_index)
    other = Projection.of(teacher_hidden, checked_head(teacher), student.rows)
    if head.group is not None and options.top_k is not None:
        check_int("top_k", options.top_k, 1, shard_range(head)[1])
    second_pass = bool(options.features) or options.top_k is not None
    backend = backend_for(impl, "divergence_second_pass" if second_pass else "divergence_forward", student, other)
    if student.num_rows == 0:
        dtype = stats_dtype(student_hidden, head.weight, teacher_hidden, teacher.weight)
        zeros = torch.zeros(targets.shape, dtype=dtype, device=targets.device)
        return Divergence(DivergenceStats(**{name: zeros.clone() for name in _given(options)}), zeros)
    with no_autocast(student_hidden.device):
        fields = backend.divergence_forward(student, other, y, options)
    stats = DivergenceStats(**{name: student.scatter(fields[name], targets.shape) for name in _given(options)})
    return Divergence(stats, student.scatter(fields["student_lse_low"], targets.shape))
