"""`nn.Module` shells for people who configure a loss once and call it often."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from sgcd_kernels.sgcd import sgcd_loss
from sgcd_kernels.validation import check_choice

HYPERPARAMETERS = (
    "config",
    "loss_type",
    "epsilon",
    "epsilon_high",
    "beta",
    "temperature",
    "softcap",
    "ignore_index",
    "reuse_lse",
    "impl",
    "group",
)


class FusedLinearSGCDLoss(nn.Module):
    """`sgcd_loss` with its hyperparameters bound: `FusedLinearSGCDLoss(loss_type="dapo")(hidden, lm_weight, ...)`.

    Takes config, loss_type, epsilon, epsilon_high, beta, temperature, softcap, ignore_index, reuse_lse, impl and group.
    Raises ValueError for a name that is none of these; values are checked at the call.
    """

    def __init__(self, **hyperparameters: Any) -> None:
        super().__init__()
        for name in hyperparameters:
            check_choice("hyperparameter", name, HYPERPARAMETERS)
        self.hyperparameters = hyperparameters

    def forward(
        self,
        hidden: Tensor,  # [N, H] or [B, T, H]
        lm_weight: Tensor,  # [V, H]
        targets: Tensor,  # [N] or [B, T]
        teacher_hidden: Tensor,  # [N, H'] or [B, T, H']
        advantages: Tensor,  # like targets, or [B]
        cu_seqlens: Tensor | None = None,  # [B + 1]
        mask: Tensor | None = None,  # like targets
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics); `inputs` are the other tensors of `sgcd_loss`: bias, old_logp, credit_mask, turn_ids, ..."""
        return sgcd_loss(
            hidden, lm_weight, targets, teacher_hidden, advantages, cu_seqlens, mask, **inputs, **self.hyperparameters
        )

    def extra_repr(self) -> str:
        defaults = inspect.signature(sgcd_loss).parameters
        values = {name: self.hyperparameters.get(name, defaults[name].default) for name in HYPERPARAMETERS}
        return ", ".join(f"{name}={value}" for name, value in values.items())
