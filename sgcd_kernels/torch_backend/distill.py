"""Gradient of a student-teacher divergence in the student's hidden states, weight and bias."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.torch_backend.blocks import block_logits, load_rows, load_words
from sgcd_kernels.torch_backend.divergence import log_mixture_ratios, pair_plan
from sgcd_kernels.torch_backend.grads import Needs, walk_gradients
from sgcd_kernels.torch_backend.logprob import FLOOR
from sgcd_kernels.types import Projection, ProjectionGrads


def distill_backward(
    student: Projection,
    teacher: Projection,
    kind: str,
    beta: float,
    lse: tuple[Tensor, Tensor],  # student's and teacher's, [n]
    centre: Tensor,  # [n], KL(p || q) for kind "reverse_kl", KL(p || m) for "jsd"
    d_loss: Tensor,  # [n]
    needs: Needs,
    group: ProcessGroup | None = None,
) -> ProjectionGrads:
    """Gradients of sum(d_loss divergence). In a student logit, with r = ln(p / m):

    reverse_kl: p (ln p - ln q - KL)     forward_kl: p - q     jsd: (1 - beta) p (r - sum p r)
    """
    blocks = pair_plan(student, teacher)

    def logit_grad(tokens: tuple[int, int], words: tuple[int, int], z: Tensor) -> Tensor:
        at = slice(*tokens)
        z_q = block_logits(teacher, load_rows(teacher, *tokens), load_words(teacher, *words), *words)
        log_q = z_q.sub_(lse[1][at].unsqueeze(1))
        log_p = z - lse[0][at].unsqueeze(1)
        p = log_p.exp()
        if kind == "forward_kl":
            dz = p.sub_(log_q.exp_())
        elif kind == "reverse_kl":
            gap = torch.where(p > 0, log_p.sub_(log_q), 0.0)
            dz = gap.sub_(centre[at].unsqueeze(1)).mul_(p)
        else:
            ratio, _ = log_mixture_ratios(log_p.clamp_(min=FLOOR), log_q, beta)
            dz = ratio.sub_(centre[at].unsqueeze(1)).mul_(p).mul_(1 - beta)
        return dz.mul_(d_loss[at].unsqueeze(1)).to(z.dtype)

    return walk_gradients(student, blocks, needs, logit_grad, group)
