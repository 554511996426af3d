"""How often an op looks at data, which on a GPU means to wait for it: counted where the bodies of the ops run.

Once at the targets (a wrong one is a ValueError before any launch), once for the number of tokens that are left, on
which shapes depend; bounds of sequences are looked at where they lie, mostly on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgcd_kernels import (
    CreditConfig,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)
from sgcd_kernels.core.lm_head import indices_of
from tests.sgcd_kernels.backends.cases import DEVICES, case, run_body

pytest.importorskip("triton")
# Those whose result, or its size, the host must know. Indexing by a mask and unique come down to these too.
LOOKS = (
    "item", "is_nonzero", "_local_scalar_dense", "equal", "nonzero", "bincount", "repeat_interleave", "_unique2",
    "unique", "masked_select",
)  # fmt: skip


class Looks(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "sgcd_kernels" and name != "credit":  # which has a test of its own
            with self:
                return run_body(func, args)
        sized = (kwargs or {}).get("output_size") is not None or func._overloadname == "self_int"
        if name == "index":
            sized = not any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in (*LOOKS, "index") and not sized:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def forward_and_backward(call: Callable[[], Any]) -> tuple[int, int]:
    with Looks() as forward:
        out = call()
    if not out.requires_grad:
        return len(forward.found), 0
    with Looks() as backward:
        (out * 0.5).sum().backward()
    return len(forward.found), len(backward.found)


@pytest.mark.parametrize("masked", [False, True])
def test_looks(masked: bool) -> None:
    c, device = case(20, 8, 70, torch.float32), DEVICES["triton"]
    y = c.y.clone()
    if masked:
        y[::3] = -100
    x, w, y, t = (a.to(device) for a in (c.x, c.w, y, c.t))
    a, mask, cu = torch.linspace(-1, 1, 20, device=device), y != -100, torch.tensor([0, 12, 20])
    leaves = x.requires_grad_(), w.requires_grad_()
    more: dict[str, Any] = {"impl": "triton"}
    assert forward_and_backward(lambda: linear_logprob(*leaves, y, **more).logp) == (2, 1)
    for options in ({}, {"features": ("jsd", "tv")}, {"top_k": 3}):
        call = lambda options=options: linear_divergence(*leaves, y, t, **options, **more).reverse_kl  # noqa: E731
        assert forward_and_backward(call) == (2, 0), options
    for kind in ("reverse_kl", "jsd"):
        call = lambda kind=kind: linear_distill_loss(*leaves, t, mask=mask, kind=kind, **more)  # noqa: E731
        assert forward_and_backward(call) == (1, 1), kind
    for loss_type in ("dapo", "gspo"):
        options = {"cu_seqlens": cu, "loss_type": loss_type, "old_logp": a - 4, "mask": mask, **more}
        call = lambda options=options: linear_policy_loss(*leaves, y, a, **options)[0]  # noqa: E731
        # Four more at the bounds, which lie on the host; in backward the loss scale, for a factor of 1 writes nothing.
        assert forward_and_backward(call) == (2 + 4, 2), loss_type


def test_looks_of_the_whole_step() -> None:
    """As the scoring pass and the loss by themselves, at the targets once more, and for the warning of inert credit.

    With `reuse_lse` also for the number of tokens whose lse is not known. Where credit cannot act, only the loss runs.
    """
    c, device = case(20, 8, 70, torch.float32), DEVICES["triton"]
    y = c.y.clone()
    y[::3] = -100
    x, w, y, t = (a.to(device) for a in (c.x, c.w, y, c.t))
    leaves = x.requires_grad_(), w.requires_grad_()
    a, cu = torch.tensor([0.5, -0.5], device=device), torch.tensor([0, 12, 20])

    def looks(call: Callable[[], Any]) -> int:
        with Looks() as seen:
            call()
        return len(seen.found)

    scoring = looks(lambda: linear_divergence(*leaves, y, t, impl="triton"))
    loss = looks(lambda: linear_policy_loss(*leaves, y, a, cu_seqlens=cu, loss_type="dapo", impl="triton"))
    at_bounds = 4  # more than the loss itself, which lie on the host
    acting, never_acting = CreditConfig(d_floor=0.01), CreditConfig(gamma=0.0)
    for config, reuse_lse, expected in (
        (acting, False, scoring + loss + at_bounds + 2),
        (acting, True, scoring + loss + at_bounds + 3),
        (never_acting, True, loss),
    ):
        options = {"config": config, "reuse_lse": reuse_lse, "loss_type": "dapo", "impl": "triton"}
        assert looks(lambda options=options: sgcd_loss(*leaves, y, t, a, cu, **options)) == expected, options  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(5))
def test_indices_of(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for n in (0, 1, 7, 1000):
        keep = torch.rand(n, generator=g) < seed / 4
        rows = indices_of(keep)
        if rows is None:
            assert bool(keep.all())
        else:
            assert rows.is_contiguous() and rows.tolist() == keep.nonzero().squeeze(1).tolist()
