"""Inputs, and the fp64 truth, shared by the tests of the compiled backends; and where each of these runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from sgcd_kernels import reference

# Triton's kernels run on a GPU if there is one, else on the CPU in its interpreter (tests/conftest.py).
DEVICES = {"cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
IMPLS = tuple(DEVICES)


class Case(NamedTuple):
    x: torch.Tensor
    w: torch.Tensor
    y: torch.Tensor
    t: torch.Tensor


def case(n: int, h: int, v: int, dtype: torch.dtype, std: float = 2.0, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed + n * 31 + h * 7 + v)
    x, w = torch.randn(n, h, generator=g) * std, torch.randn(v, h, generator=g) / h**0.5
    t = x + 0.3 * std * torch.randn(n, h, generator=g)
    return Case(x.to(dtype), w.to(dtype), torch.randint(v, (n,), generator=g), t.to(dtype))


def on(c: Case, impl: str) -> Case:
    return Case(*(x.to(DEVICES[impl]) for x in c))


def skip_if_slow(impl: str, n: int, v: int) -> None:
    if impl == "triton" and DEVICES[impl] == "cpu" and n * v > 25_000:
        pytest.skip("takes too long in the interpreter")


def has_body(op: torch._ops.OpOverload) -> bool:
    """Whether this is one of our ops that are made of others, and not an operator of csrc/."""
    return op.namespace == "sgcd_kernels" and op.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeExplicitAutograd
    )


def run_body(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
    """What one of our ops does, as ops of PyTorch: a dispatch mode sees these where it is on."""
    return op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)


Leaves = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden, weight, bias


def leaves_of(c: Case, dtype: torch.dtype, device: str = "cpu") -> Leaves:
    bias = torch.linspace(-1, 1, c.w.shape[0]).to(c.w.dtype)
    return tuple(a.to(device, dtype).requires_grad_() for a in (c.x, c.w, bias))  # type: ignore[return-value]


def grads(loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], leaves: Leaves) -> Leaves:
    return tuple(g.cpu() for g in torch.autograd.grad(loss(*leaves), leaves))  # type: ignore[return-value]


def weights(n: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.linspace(-1, 2, n, device=device)


def exact(c: Case, dtype: torch.dtype = torch.float64, **extras: Any) -> dict[str, torch.Tensor]:
    """Every statistic of `linear_divergence` by the reference, in fp64 unless told."""
    extras = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in extras.items()}
    p = reference.logits(c.x.to(dtype), c.w.to(dtype), **extras)
    q = reference.logits(c.t.to(dtype), c.w.to(dtype), **extras)
    (s_logp, s_entropy, s_lse), (t_logp, t_entropy, t_lse) = reference.logprob(p, c.y), reference.logprob(q, c.y)
    return {
        "student_logp": s_logp,
        "teacher_logp": t_logp,
        "student_entropy": s_entropy,
        "teacher_entropy": t_entropy,
        "student_lse": s_lse,
        "teacher_lse": t_lse,
        "reverse_kl": reference.kl(p, q),
        "forward_kl": reference.kl(q, p),
        "bhattacharyya": reference.bhattacharyya(p, q),
        "jsd": reference.jsd(p, q, 0.3),
        "tv": reference.tv(p, q),
    }
