"""sgcd_loss with everything switched on, against the formulas written out in fp64: loss and gradients, rule by rule."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from sgcd_kernels import (
    CreditConfig,
    credit_weights,
    linear_distill_loss,
    linear_divergence,
    linear_policy_loss,
    sgcd_loss,
)
from sgcd_kernels.credit.config import Rule

F64 = torch.float64
N, H, V, ITEMS = 30, 6, 40, 33
CU = torch.tensor([0, 11, 30])
TEMPERATURE, SOFTCAP, BETA, EPSILON, EPSILON_HIGH = 0.7, 5.0, 0.1, 0.15, 0.28


@pytest.mark.parametrize("rule", get_args(Rule))
def test_every_rule_with_every_option(rule: str) -> None:
    torch.manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=F64)

    x, w, b = (leaf.requires_grad_() for leaf in (rand(N, H), rand(V, H), rand(V)))
    teacher, teacher_weight, teacher_bias = rand(N, H + 2), rand(V, H + 2), rand(V)
    y, advantages, turns = torch.randint(V, (N,)), rand(2), torch.arange(N) // 4
    mask, credit_mask = torch.rand(N) < 0.8, torch.rand(N) < 0.8
    config = CreditConfig(rule=rule)

    def log_softmax(h: torch.Tensor, head: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (SOFTCAP * torch.tanh((h @ head.T + bias) / SOFTCAP) / TEMPERATURE).log_softmax(-1)

    log_p, log_q = log_softmax(x, w, b), log_softmax(teacher, teacher_weight, teacher_bias)
    logp, at, fixed = log_p[torch.arange(N), y], (torch.arange(N), y), log_p.detach()
    p, q = fixed.exp(), log_q.exp()
    old, ref, importance = fixed[at] + 0.2 * rand(N), fixed[at] + 0.2 * rand(N), rand(N).abs() + 0.5
    weights = credit_weights(
        (p * (fixed - log_q)).sum(-1),
        -(q * log_q).sum(-1),
        CU,
        mask=mask & credit_mask,
        turn_ids=turns,
        advantages=advantages,
        log_ratio=log_q[at] - fixed[at],
        forward_kl=(q * (log_q - fixed)).sum(-1),
        bhattacharyya=(p * q).sqrt().sum(-1),
        student_entropy=-(p * fixed).sum(-1),
        config=config,
    ).weights
    assert rule == "none" or (weights[mask & credit_mask] != 1).any()
    a = advantages.repeat_interleave(CU.diff()) * weights
    ratio = (logp - old).exp()
    policy = -torch.minimum(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH) * a) * importance
    want = ((policy + BETA * ((ref - logp).exp() - (ref - logp) - 1)) * mask).sum() / ITEMS
    got, _ = sgcd_loss(
        x,
        w,
        y,
        teacher,
        advantages,
        CU,
        mask,
        credit_mask=credit_mask,
        turn_ids=turns,
        teacher_weight=teacher_weight,
        old_logp=old,
        ref_logp=ref,
        importance_weights=importance,
        config=config,
        loss_type="dapo",
        epsilon=EPSILON,
        epsilon_high=EPSILON_HIGH,
        beta=BETA,
        temperature=TEMPERATURE,
        bias=b,
        teacher_bias=teacher_bias,
        softcap=SOFTCAP,
        num_items_in_batch=ITEMS,
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for ours, plain in zip(torch.autograd.grad(got, (x, w, b)), torch.autograd.grad(want, (x, w, b))):
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-14)


def test_autocast_changes_no_bit() -> None:
    torch.manual_seed(0)
    n, h, v = 20, 64, 300
    x, w, y = torch.randn(n, h), torch.randn(v, h) / 8, torch.randint(v, (n,))
    teacher, advantages, cu = torch.randn(n, h), torch.ones(1), torch.tensor([0, n])

    def everything() -> list[torch.Tensor]:
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        out = list(linear_divergence(x, w, y, teacher, features=("jsd", "tv"), top_k=3))
        losses = (
            linear_policy_loss(a, b, y, advantages, cu_seqlens=cu)[0],
            linear_distill_loss(a, b, teacher, kind="jsd"),
            sgcd_loss(a, b, y, teacher, advantages, cu)[0],
        )
        for loss in losses:
            out += [loss.detach(), *torch.autograd.grad(loss, (a, b))]
        return out

    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ w.T).dtype == torch.bfloat16
        cast = everything()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, cast))
