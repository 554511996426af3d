"""Gradient of a student-teacher divergence with respect to the student's hidden states, weight and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from sgcd_kernels.backends.protocol import DistillSaved
from sgcd_kernels.backends.torch.blocks import TokenBlock
from sgcd_kernels.backends.torch.divergence import log_mixture_ratios, pair_plan
from sgcd_kernels.backends.torch.gradients import sweep_gradients
from sgcd_kernels.core.lm_head import HeadGrads, Needs, Projection
from sgcd_kernels.core.statistics import MIN_EXPONENT, minus_lse


def distill_backward(
    student: Projection,
    teacher: Projection,
    divergence: tuple[str, float],
    saved: DistillSaved,
    upstream: Tensor,
    needs: Needs,
) -> HeadGrads:
    kind, beta = divergence

    def logit_grad(tokens: slice, vocab: slice, z: Tensor) -> Tensor:
        z_q = TokenBlock.of(teacher, tokens).logits(vocab)
        log_q = minus_lse(z_q, saved.teacher_lse[tokens], saved.teacher_lse_low[tokens])
        log_p = minus_lse(z, saved.student_lse[tokens], saved.student_lse_low[tokens])
        mean = saved.mean_log_ratio[tokens].unsqueeze(1)
        p = log_p.exp()
        if kind == "forward_kl":
            near_one = torch.maximum(log_p, log_q) > -0.5  # where p - q would lose 1 - p and 1 - q
            dz = torch.where(near_one, log_p.expm1() - log_q.expm1(), p.sub_(log_q.exp()))
        elif kind == "reverse_kl":
            dz = torch.where(p > 0, log_p.sub_(log_q), 0.0).sub_(mean).mul_(p)
            dz.masked_fill_(mean == torch.inf, 0.0)  # inf - inf
        else:
            ratio, _ = log_mixture_ratios(log_p.clamp_(min=MIN_EXPONENT), log_q, beta)
            dz = ratio.sub_(mean).mul_(p).mul_(1 - beta)
        return dz.mul_(upstream[tokens].unsqueeze(1)).to(z.dtype)

    return sweep_gradients(student, pair_plan(student, teacher), needs, logit_grad)
