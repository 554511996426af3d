"""What PyTorch does around the ops: inference mode, autocast, saved tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sgcd_kernels import (
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)

N, H, V = 12, 8, 60
CU = torch.tensor([0, 5, 12])
torch.manual_seed(0)
X, W, T = torch.randn(N, H), torch.randn(V, H), torch.randn(N, H)
Y, A, OLD = torch.randint(V, (N,)), torch.randn(N), -4 + torch.randn(N)


def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    return X.clone().requires_grad_(), W.clone().requires_grad_()


Op = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OPS: dict[str, Op] = {
    "logprob": lambda x, w: linear_logprob(x, w, Y).logp.sum(),
    "divergence": lambda x, w: linear_divergence(x, w, Y, T).reverse_kl.sum() + 0 * x.sum() + 0 * w.sum(),
    "policy": lambda x, w: linear_policy_loss(x, w, Y, A, old_logp=OLD, cu_seqlens=CU)[0],
    "distill": lambda x, w: linear_distill_loss(x, w, T),
    "sgcd": lambda x, w: sgcd_loss(x, w, Y, T, A, CU)[0],
}


@pytest.mark.parametrize("op", OPS)
def test_inference_mode_gives_the_same_value(op: str) -> None:
    want = OPS[op](*leaves()).detach()
    with torch.inference_mode():
        assert torch.equal(OPS[op](*leaves()), want)


def test_no_autograd_where_nothing_needs_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("autograd ran")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    OPS["policy"](X, W)
    with torch.no_grad():
        OPS["policy"](*leaves())


def test_tensors_of_inference_mode_enter_a_training_call() -> None:
    x, w = leaves()
    given = {"advantages": A, "old_logp": OLD, "ref_logp": OLD, "importance_weights": A.abs()}
    with torch.inference_mode():
        made = {name: value.clone() for name, value in given.items()}
        teacher, teacher_weight, bias = T.clone(), W.clone(), torch.ones(V)
        temperature = torch.full((N,), 0.7)
    for kind in ("reverse_kl", "jsd"):
        linear_distill_loss(
            x, w, teacher, teacher_weight, teacher_bias=bias, kind=kind, temperature=temperature
        ).backward()
    sgcd_loss(x, w, Y, teacher, made["advantages"], CU, temperature=temperature)[0].backward()
    ours, _ = linear_policy_loss(x, w, Y, **made, cu_seqlens=CU, beta=0.1)
    plain, _ = linear_policy_loss(x, w, Y, **given, cu_seqlens=CU, beta=0.1)
    assert torch.equal(torch.autograd.grad(ours, x)[0], torch.autograd.grad(plain, x)[0])


@pytest.mark.parametrize("name", ["teacher_hidden", "teacher_weight", "teacher_bias", "temperature"])
def test_a_teacher_that_changes_before_backward_is_noticed(name: str) -> None:
    x, w = leaves()
    given = {"teacher_hidden": T.clone(), "teacher_weight": W.clone(), "teacher_bias": torch.zeros(V)}
    given["temperature"] = torch.ones(N)
    loss = linear_distill_loss(x, w, **given)
    given[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
