"""How an op is made known to PyTorch.

Not by `torch.library.custom_op`, which does the same for more: its first call imports torch._dynamo, which takes a
second and serves nobody who does not compile.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

_LIBRARY = torch.library.Library("sgcd", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch forgets what is dropped


def register(
    body: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The op sgcd::<name of body>, its schema the annotations of `body`; none of its results may share memory.

    `fake` gives empty results of the right shape and dtype; `setup` and `backward` are those of an autograd.Function.
    An op without them is to be called where no gradient is recorded.
    """
    name = body.__name__
    schema = torch.library.infer_schema(body, mutates_args=())
    torch.library.define(f"sgcd::{name}", schema, lib=_LIBRARY, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"sgcd::{name}", "CompositeExplicitAutograd", on_its_device(_untraced(body)), lib=_LIBRARY)
    torch.library.register_fake(f"sgcd::{name}", fake, lib=_LIBRARY)
    if setup is not None and backward is not None:
        torch.library.register_autograd(f"sgcd::{name}", backward, setup_context=setup, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.sgcd, name).default
    return op


def on_its_device(body: Callable[..., Any]) -> Callable[..., Any]:
    """With the GPU current where the tensors lie: Triton launches on the current one, whatever it is given."""

    @functools.wraps(body)
    def run(*args: Any) -> Any:
        device = next((x.device for x in args if isinstance(x, Tensor) and x.is_cuda), None)
        if device is None:
            return body(*args)
        with torch.cuda.device(device):
            return body(*args)

    return run


def _untraced(body: Callable[..., Any]) -> Callable[..., Any]:
    """Where torch.compile has given up on a function it still watches what that calls, this body among it."""
    disabled = _disable_dynamo(body)  # imports torch._dynamo when it is called

    @functools.wraps(body)
    def run(*args: Any) -> Any:
        return disabled(*args) if "torch._dynamo" in sys.modules else body(*args)

    return run


def saveable(x: Tensor | None) -> Tensor | None:
    """Fit to be saved for a backward pass: what inference mode has made must be copied for that."""
    return x.clone() if x is not None and x.is_inference() else x
