"""Liger's GRPO loss on these kernels, with the same arguments but advantages that may be per token; also with credit.

from sgcd_kernels.integrations.liger import LigerFusedLinearGRPOLoss, LigerFusedLinearSGCDLoss

Names, order and meaning of the arguments are those of liger-kernel 0.8.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack  # a dependency of torch; in `typing` from 3.11

from sgcd_kernels.core.registration import as_number_tensor
from sgcd_kernels.core.surrogate import LOSSES_ELSEWHERE
from sgcd_kernels.core.validation import check_choice, check_float, check_tensor
from sgcd_kernels.credit.config import DEFAULT, CreditConfig, check_config
from sgcd_kernels.ops.logprob import linear_logprob
from sgcd_kernels.ops.policy_loss import linear_policy_loss
from sgcd_kernels.ops.sgcd import sgcd_loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
LEVELS = ("token", "sequence")
ELSEWHERE = {**LOSSES_ELSEWHERE, "gspo": "loss_type 'grpo' with importance_sampling_level 'sequence' in Liger"}


class LigerOptions(TypedDict, total=False):
    """Constructor arguments of both losses; defaults and meaning as in `LigerFusedLinearGRPOLoss`."""

    beta: float
    compiled: bool
    use_ref_model: bool
    chunk_size: int
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    max_completion_length: int | None
    importance_sampling_level: str
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    temperature: float
    delta: float | None
    use_bias_correction_kl: bool
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    impl: str


class _LigerLoss(nn.Module):
    """The common part of both losses: Liger's hyperparameters, and the translation of its arguments."""

    beta: float
    temperature: float
    impl: str
    use_ref_model: bool
    loss_type: str
    max_completion_length: int | None
    epsilon: tuple[float, float]  # below and above 1

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("loss_type", loss_type, LOSS_TYPES, ELSEWHERE)
        check_choice("importance_sampling_level", importance_sampling_level, LEVELS)
        if importance_sampling_level == "sequence" and loss_type != "grpo":
            raise ValueError(f"importance_sampling_level is 'sequence', needs loss_type 'grpo', got {loss_type!r}")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length is None, needs a number of tokens for loss_type 'dr_grpo'")
        for name, value in {"delta": delta, "use_bias_correction_kl": use_bias_correction_kl}.items():
            if value:
                raise ValueError(f"{name} is {value}, needs to be off: the policy loss has no such term")
        self.beta, self.temperature, self.impl, self.use_ref_model = beta, temperature, impl, use_ref_model
        self.loss_type = "gspo" if importance_sampling_level == "sequence" else loss_type
        self.max_completion_length = max_completion_length
        self.epsilon = epsilon_low, epsilon_high - 1 if loss_type == "cispo" else epsilon_high

    def _arguments(
        self,
        ids: Tensor,  # [B, T]
        mask: Tensor,  # [B, T]
        bias: Tensor | None,
        ref_logp: Tensor | None,
        old_logp: Tensor | None,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        vllm_is_ratio: Tensor | None,
        num_items_in_batch: float | Tensor | None,
    ) -> dict[str, Any]:
        """The keywords of `linear_policy_loss` and `sgcd_loss`."""
        if not self.use_ref_model:
            ref_logp = None  # as in Liger, even if one is given
        elif ref_logp is not None and ref_input is not None:
            warnings.warn(
                "Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps.", stacklevel=3
            )
        elif self.beta != 0 and ref_logp is None:
            ref_logp = self._reference(ids, ref_input, ref_weight, ref_bias)
        return {
            "old_logp": old_logp,
            "mask": mask,
            "loss_type": self.loss_type,
            "epsilon": self.epsilon[0],
            "epsilon_high": self.epsilon[1],
            "beta": self.beta if ref_logp is not None else 0.0,
            "ref_logp": ref_logp,
            "importance_weights": None if vllm_is_ratio is None else self._importance(vllm_is_ratio, mask),
            "temperature": self.temperature,
            "bias": bias,
            "num_items_in_batch": self._divisor(mask, num_items_in_batch),
            "impl": self.impl,
        }

    def _importance(self, ratio: Tensor, mask: Tensor) -> Tensor:  # [B, T]
        """At the level of sequences the mean of each: all tokens' gradients go through one ratio, as in Liger."""
        weights = _per_token(ratio, mask.shape)
        if self.loss_type != "gspo":
            return weights
        total = weights.masked_fill(mask == 0, 0.0).sum(dim=1, keepdim=True)
        return (total / (mask != 0).sum(dim=1, keepdim=True).clamp(min=1)).expand(mask.shape)

    @torch.no_grad()
    def _reference(self, ids: Tensor, states: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if states is None or weight is None:
            raise ValueError("ref_input or ref_weight is None, and ref_per_token_logps too: beta needs a reference")
        states = _states("ref_input", states, ids)
        return linear_logprob(states, weight, ids, bias=bias, temperature=self.temperature, impl=self.impl).logp

    def _metrics(self, metrics: dict[str, Tensor]) -> tuple[Tensor, ...]:
        clipped = metrics["clip_ratio/region_mean"]
        return (clipped,) if self.beta == 0 else (metrics.get("kl", torch.zeros_like(clipped)), clipped)

    def _divisor(self, mask: Tensor, num_items_in_batch: float | Tensor | None) -> float | Tensor | None:
        """dapo and cispo divide by the mean number of tokens of the processes; dr_grpo by a constant."""
        if self.loss_type == "dr_grpo" and self.max_completion_length is not None:
            return float(mask.shape[0] * self.max_completion_length)
        if self.loss_type not in ("dapo", "cispo"):
            return None
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if num_items_in_batch is None:
            if processes == 1:
                return None
            num_items_in_batch = mask.sum()
            dist.all_reduce(num_items_in_batch)
        check_float("num_items_in_batch", num_items_in_batch, 0.0)
        items = as_number_tensor(num_items_in_batch) / processes
        return torch.where(items < 0, items, items.clamp(min=1.0))  # the op refuses what is negative


def _states(name: str, states: Tensor, ids: Tensor) -> Tensor:  # [B, T, H] or [B T, H]
    """Hidden states as [B, T, H]."""
    check_tensor("selected_token_ids", ids)
    check_tensor(name, states)
    if ids.dim() != 2 or states.dim() < 2 or states.shape[:-1].numel() != ids.numel():
        got, ids_got = list(states.shape), list(ids.shape)
        raise ValueError(f"{name} has shape {got}, needs [B, T, H] to fit selected_token_ids [B, T], here {ids_got}")
    return states.reshape(*ids.shape, states.shape[-1])


def _per_token(ratio: Tensor, shape: torch.Size) -> Tensor:
    """[B] and [B, 1] are one value per sequence, even if B = T."""
    check_tensor("vllm_is_ratio", ratio)
    batch, tokens = shape
    if ratio.shape not in ((batch,), (batch, 1), (batch, tokens)):
        raise ValueError(
            f"vllm_is_ratio has shape {list(ratio.shape)}, needs [{batch}] or [{batch}, 1] (per sequence) or "
            f"[{batch}, {tokens}] (per token)"
        )
    return (ratio.unsqueeze(-1) if ratio.dim() == 1 else ratio).expand(shape)


class LigerFusedLinearGRPOLoss(_LigerLoss):
    """GRPO-family loss of hidden states, called like liger-kernel's class of that name.

    Args:
        beta, epsilon_low, epsilon_high, loss_type, max_completion_length, importance_sampling_level, temperature,
            use_ref_model: as in Liger (for "cispo" epsilon_high is the cap of the ratio itself).
        compiled, chunk_size: accepted and ignored; there is nothing to compile, and chunks are chosen automatically.
        impl: the backend.
        sapo_*, vespo_*: accepted and ignored; the losses that read them are refused.

    Raises:
        ValueError: at construction, for loss_type "sapo", "vespo" or "luspo", for importance_sampling_level "sequence"
            with a loss_type other than "grpo", and for delta or use_bias_correction_kl.

    >>> criterion = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="dapo")
    >>> hidden, weight = torch.zeros(2, 3, 4), torch.zeros(8, 4)
    >>> ids, mask, advantages = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), torch.tensor([1.0, -0.5])
    >>> loss, metrics = criterion(hidden, weight, ids, mask, advantages)
    >>> loss.item()  # on-policy: minus the mean advantage
    -0.25
    """

    def forward(
        self,
        _input: Tensor,  # [B, T, H]
        lin_weight: Tensor,  # [V, H]
        selected_token_ids: Tensor,  # [B, T]
        attention_mask: Tensor,  # [B, T]; true where a token has a loss
        advantages: Tensor,  # [B], or [B, T] per token
        bias: Tensor | None = None,  # [V]
        ref_per_token_logps: Tensor | None = None,  # [B, T]; not read without use_ref_model
        old_per_token_logps: Tensor | None = None,  # [B, T]
        ref_input: Tensor | None = None,  # [B, T, H']
        ref_weight: Tensor | None = None,  # [V, H']
        ref_bias: Tensor | None = None,  # [V]
        vllm_is_ratio: Tensor | None = None,  # [B, T], or [B] or [B, 1] per sequence
        num_items_in_batch: float | Tensor | None = None,  # tokens
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and its metrics: the k3 KL to the reference (if beta is not 0), the fraction of clipped tokens."""
        more = self._arguments(
            selected_token_ids,
            attention_mask,
            bias,
            ref_per_token_logps,
            old_per_token_logps,
            ref_input,
            ref_weight,
            ref_bias,
            vllm_is_ratio,
            num_items_in_batch,
        )
        states = _states("_input", _input, selected_token_ids)
        loss, metrics = linear_policy_loss(states, lin_weight, selected_token_ids, advantages, **more)
        return loss, self._metrics(metrics)

    if TYPE_CHECKING:
        __call__ = forward  # for type checkers: nn.Module's takes and returns Any


class LigerFusedLinearSGCDLoss(_LigerLoss):
    """`FusedLinearSGCDLoss` called like liger-kernel's GRPO loss, with further arguments for the teacher.

    Takes `config`, a `CreditConfig`, and the arguments of `LigerFusedLinearGRPOLoss`, and raises the same errors. With
    gamma 0 its results are bitwise those of `LigerFusedLinearGRPOLoss`. It returns Liger's two metrics; use
    `FusedLinearSGCDLoss` for `credit/*`.

    >>> criterion = LigerFusedLinearSGCDLoss(beta=0.0, loss_type="dapo")
    >>> g = torch.Generator().manual_seed(0)
    >>> hidden, teacher, weight = (torch.randn(*n, 4, generator=g) for n in ((2, 3), (2, 3), (8,)))
    >>> ids, mask, advantages = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), torch.tensor([1.0, -0.5])
    >>> loss, metrics = criterion(hidden, weight, ids, mask, advantages, teacher_input=teacher)
    >>> plain, _ = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="dapo")(hidden, weight, ids, mask, advantages)
    >>> bool(loss != plain), len(metrics)
    (True, 1)
    """

    config: CreditConfig

    def __init__(self, *, config: CreditConfig = DEFAULT, **options: Unpack[LigerOptions]) -> None:
        super().__init__(**options)
        check_config(config)
        self.config = config

    def forward(
        self,
        _input: Tensor,  # [B, T, H]
        lin_weight: Tensor,  # [V, H]
        selected_token_ids: Tensor,  # [B, T]
        attention_mask: Tensor,  # [B, T]; true where a token has a loss
        advantages: Tensor,  # [B], or [B, T] per token
        bias: Tensor | None = None,  # [V]
        ref_per_token_logps: Tensor | None = None,  # [B, T]; not read without use_ref_model
        old_per_token_logps: Tensor | None = None,  # [B, T]
        ref_input: Tensor | None = None,  # [B, T, H']
        ref_weight: Tensor | None = None,  # [V, H']
        ref_bias: Tensor | None = None,  # [V]
        vllm_is_ratio: Tensor | None = None,  # [B, T], or [B] or [B, 1] per sequence
        num_items_in_batch: float | Tensor | None = None,  # tokens
        *,
        teacher_input: Tensor,  # [B, T, H']; the teacher's states at the same tokens
        has_teacher: Tensor | None = None,  # [B, T] or [B]; None is everywhere
        teacher_weight: Tensor | None = None,  # [V, H']; None is the student's
        teacher_bias: Tensor | None = None,  # [V]
        turn_ids: Tensor | None = None,  # [B, T]
        credit_mask: Tensor | None = None,  # [B, T]; true where a loss token may carry credit
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and its metrics: the k3 KL to the reference (if beta is not 0), the fraction of clipped tokens."""
        more = self._arguments(
            selected_token_ids,
            attention_mask,
            bias,
            ref_per_token_logps,
            old_per_token_logps,
            ref_input,
            ref_weight,
            ref_bias,
            vllm_is_ratio,
            num_items_in_batch,
        )
        loss, metrics = sgcd_loss(
            _states("_input", _input, selected_token_ids),
            lin_weight,
            selected_token_ids,
            _states("teacher_input", teacher_input, selected_token_ids),
            advantages,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            has_teacher=has_teacher,
            turn_ids=turn_ids,
            credit_mask=credit_mask,
            config=self.config,
            **more,
        )
        return loss, self._metrics(metrics)

    if TYPE_CHECKING:
        __call__ = forward
