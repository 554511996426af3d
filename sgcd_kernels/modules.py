"""`nn.Module` shells for people who configure a loss once and call it often."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import Unpack  # torch brings it; `typing` has it from 3.11

from sgcd_kernels.backends import IMPLS, backend_status
from sgcd_kernels.credit import check_config
from sgcd_kernels.credit_config import CreditConfig
from sgcd_kernels.policy_loss import check_options
from sgcd_kernels.sgcd import sgcd_loss
from sgcd_kernels.validation import check_choice, check_float, check_int


class Hyperparameters(TypedDict, total=False):
    """What `FusedLinearSGCDLoss` binds; defaults and meaning as in `sgcd_loss`."""

    config: CreditConfig
    loss_type: str
    epsilon: float
    epsilon_high: float | None
    beta: float
    temperature: float | Tensor
    softcap: float | None
    ignore_index: int
    reuse_lse: bool
    impl: str
    group: ProcessGroup | None


HYPERPARAMETERS = tuple(Hyperparameters.__annotations__)
DEFAULTS = {name: inspect.signature(sgcd_loss).parameters[name].default for name in HYPERPARAMETERS}


class Inputs(TypedDict, total=False):
    """The further tensors of a call; shapes as in `sgcd_loss`."""

    credit_mask: Tensor | None
    turn_ids: Tensor | None
    teacher_weight: Tensor | None
    old_logp: Tensor | None
    ref_logp: Tensor | None
    importance_weights: Tensor | None
    bias: Tensor | None
    teacher_bias: Tensor | None
    num_items_in_batch: float | Tensor | None


class FusedLinearSGCDLoss(nn.Module):
    """`sgcd_loss` with its hyperparameters bound: `FusedLinearSGCDLoss(loss_type="dapo")(hidden, lm_weight, ...)`.

    Takes config, loss_type, epsilon, epsilon_high, beta, temperature, softcap, ignore_index, reuse_lse, impl and group.

    Raises ValueError when it is made: for a name that is none of these, a value that does not fit, or a backend that
    cannot run on this machine. What a model must not be (packed with a recurrent state, quantised head, tied under
    vocab-parallelism) `check_model` says.

    >>> import torch
    >>> criterion = FusedLinearSGCDLoss(config=CreditConfig(d_floor=1e-3), loss_type="dapo", epsilon_high=0.28)
    >>> g = torch.Generator().manual_seed(0)
    >>> hidden, teacher, weight = (torch.randn(n, 8, generator=g) for n in (6, 6, 32))  # 2 sequences, 3 tokens each
    >>> hidden.requires_grad_() is hidden
    True
    >>> targets, advantages = torch.randint(32, (6,), generator=g), torch.tensor([1.0, -1.0])
    >>> loss, metrics = criterion(hidden, weight, targets, teacher, advantages, torch.tensor([0, 3, 6]))
    >>> loss.backward()
    >>> hidden.grad.shape, bool(metrics["credit/mean_weight"] > 1)
    (torch.Size([6, 8]), True)
    """

    def __init__(self, **hyperparameters: Unpack[Hyperparameters]) -> None:
        super().__init__()
        for name in hyperparameters:
            check_choice("hyperparameter", name, HYPERPARAMETERS)
        self.hyperparameters = hyperparameters
        _check_values(self.bound())

    def forward(
        self,
        hidden: Tensor,  # [N, H] or [B, T, H]
        lm_weight: Tensor,  # [V, H]
        targets: Tensor,  # [N] or [B, T]
        teacher_hidden: Tensor,  # [N, H'] or [B, T, H']
        advantages: Tensor,  # like targets, or [B]
        cu_seqlens: Tensor | None = None,  # [B + 1]
        mask: Tensor | None = None,  # like targets
        **inputs: Unpack[Inputs],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics); `inputs` are the other tensors of `sgcd_loss`: bias, old_logp, credit_mask, turn_ids, ..."""
        return sgcd_loss(
            hidden, lm_weight, targets, teacher_hidden, advantages, cu_seqlens, mask, **inputs, **self.hyperparameters
        )

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's takes and gives anything

    def bound(self) -> dict[str, Any]:
        """Every hyperparameter by name, defaults included."""
        return DEFAULTS | dict(self.hyperparameters)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.bound().items())


def _check_values(values: dict[str, Any]) -> None:
    check_config(values["config"])
    check_options(*(values[name] for name in ("loss_type", "epsilon", "epsilon_high", "beta")))
    for name in ("temperature", "softcap"):
        if values[name] is not None and not isinstance(values[name], Tensor):
            check_float(name, values[name], 0.0, open_low=True)
    check_int("ignore_index", values["ignore_index"])
    if not isinstance(values["reuse_lse"], bool):
        raise ValueError(f"reuse_lse is {values['reuse_lse']!r}, needs True or False")
    if values["group"] is not None and not isinstance(values["group"], ProcessGroup):
        raise ValueError(f"group is {values['group']!r}, needs a torch.distributed.ProcessGroup or None")
    check_choice("impl", values["impl"], IMPLS)
    if values["impl"] != "auto" and not (status := backend_status()[values["impl"]]).usable:
        raise ValueError(
            f"impl is {values['impl']!r}, which cannot run here: {status.reason}; needs another, or 'auto'"
        )
