"""Per-token divergences between a student and a teacher distribution, without the logits of either."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.backends import IMPLS
from sgcd_kernels.registered import divergence as registered
from sgcd_kernels.shard import name_of
from sgcd_kernels.types import DivergenceStats
from sgcd_kernels.validation import (
    check_choice,
    check_device,
    check_float,
    check_head,
    check_int,
    check_jsd_beta,
    check_targets,
    check_tensor,
    tempering,
)

FEATURES = ("jsd", "tv")


@torch.no_grad()
def linear_divergence(
    student_hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    teacher_hidden: Tensor,  # [N, H'] or [B, T, H']
    teacher_weight: Tensor | None = None,  # [V, H']
    *,
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or one a token
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

    With the running A_p = sum e^{z_p - m_p} (z_p - z_q) and A_q likewise, KL(p || q) = A_p / Z_p - (lse_p - lse_q) and
    KL(q || p) = (lse_p - lse_q) - A_q / Z_q: the difference of logits is what is summed, so that small divergences keep
    their digits, and identical distributions give exactly 0. Every divergence is clamped to >= 0.

    `features` may name "jsd" (Jensen-Shannon with weight `beta` on the teacher, as GKD, arXiv 2306.13649, beta in
    [1e-6, 1 - 1e-6]) and "tv"; they cost a second pass. `top_k` adds the KLs over the teacher's K likeliest words, the
    observed token and one bucket for all others (SDPO, arXiv 2601.20802); they never exceed the full KLs but for
    rounding. They too cost a second pass (one for all).

    A NaN or +inf logit makes that token's results NaN and no other's. A logit of -inf is a word of probability 0: where
    both have it, it adds nothing; where only q has it, reverse_kl is +inf, where only p has it, forward_kl is. The
    top-K KL of that way is +inf too if the word has a bucket of its own. Under a softcap c an infinite bias forbids
    nothing: the logit is then -c or c.

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
    for feature in features:
        check_choice("features", feature, FEATURES)
    check_float("beta", beta, 0.0, 1.0)
    if "jsd" in features:
        check_jsd_beta(beta)
    check_choice("impl", impl, IMPLS)
    check_int("ignore_index", ignore_index)
    leading = check_pair(
        student_hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, temperature, softcap
    )
    check_targets(targets, leading, student_hidden.device)
    if top_k is not None:  # a shard's V is known where its op runs
        check_int("top_k", top_k, 1, weight.shape[0] if group is None else math.inf)
    values = registered.op(
        student_hidden,
        weight,
        targets,
        teacher_hidden,
        teacher_weight,
        bias,
        bias_of_teacher(bias, teacher_weight, teacher_bias),
        *tempering(temperature),
        None if softcap is None else float(softcap),
        ignore_index,
        "jsd" in features,
        "tv" in features,
        float(beta),
        top_k,
        impl,
        name_of(group),
    )
    names = registered.asked_fields("jsd" in features, "tv" in features, top_k)
    return DivergenceStats(**dict(zip(names, values, strict=True)))


def check_pair(
    student_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> torch.Size:
    """Check both heads; give the leading shape."""
    leading = check_head(student_hidden, weight, bias, temperature, softcap)
    check_tensor("teacher_hidden", teacher_hidden)
    if teacher_hidden.shape[:-1] != leading:
        got, needs = list(teacher_hidden.shape[:-1]), list(leading)
        raise ValueError(f"teacher_hidden has leading shape {got}, needs {needs} as student_hidden")
    check_device("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    teacher_bias = bias_of_teacher(bias, teacher_weight, teacher_bias)
    teacher_weight = weight if teacher_weight is None else teacher_weight
    check_head(teacher_hidden, teacher_weight, teacher_bias, temperature, softcap, prefix="teacher_")
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"teacher_weight has V = {teacher_weight.shape[0]}, needs V = {weight.shape[0]} as weight")
    return leading


def bias_of_teacher(bias: Tensor | None, teacher_weight: Tensor | None, teacher_bias: Tensor | None) -> Tensor | None:
    """A teacher that uses the student's head uses its bias too, unless it has its own."""
    return bias if teacher_weight is None and teacher_bias is None else teacher_bias
