"""Liger-Kernel: its Triton kernels on a GPU, its chunked losses (plain PyTorch, compiled as it ships them) anywhere."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from bench.inputs import EPSILON, EPSILON_HIGH, IGNORED, Inputs
from bench.providers import Outputs, needs, provides
from bench.truth import BETA

PACKAGE = "liger-kernel"
on_gpu = needs("liger_kernel", gpu=True)
anywhere = needs("liger_kernel")


@provides("cross_entropy", "liger", package=PACKAGE, refuses=on_gpu)
def cross_entropy(i: Inputs, mode: str) -> Outputs:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return {"loss": LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)(i.weight, i.hidden, i.targets)}


@provides("distill", "liger", package=PACKAGE, refuses=on_gpu)
def fused_jsd(i: Inputs, mode: str) -> Outputs:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=BETA, ignore_index=IGNORED)
    return {"loss": loss(i.hidden, i.weight, i.teacher, i.weight.detach(), i.targets)}


@functools.cache
def chunked_jsd_loss() -> Any:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, ignore_index=IGNORED)


@provides("distill", "liger-chunked", package=PACKAGE, refuses=anywhere, compiles=True)
def chunked_jsd(i: Inputs, mode: str) -> Outputs:
    return {"loss": chunked_jsd_loss()(i.hidden, i.weight, i.teacher, i.weight.detach(), i.targets)}


@functools.cache
def chunked_grpo_loss() -> Any:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=EPSILON, epsilon_high=EPSILON_HIGH, loss_type="dapo"
    )


def grpo(i: Inputs, weights: Tensor | None = None) -> Tensor:
    """Sequences of equal length as [B, T]. A token's weight goes in as its importance ratio, which multiplies."""
    b = i.sequences
    loss, _ = chunked_grpo_loss()(
        i.hidden.view(b, -1, i.hidden.shape[-1]),
        i.weight,
        i.ids.view(b, -1),
        i.mask.view(b, -1).float(),
        i.advantages,
        old_per_token_logps=i.old_logp.view(b, -1),
        vllm_is_ratio=None if weights is None else weights.view(b, -1),
    )
    return loss  # type: ignore[no-any-return]


@provides("policy_loss", "liger-chunked", package=PACKAGE, refuses=anywhere, compiles=True)
def policy_loss(i: Inputs, mode: str) -> Outputs:
    return {"loss": grpo(i)}
