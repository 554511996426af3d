"""`LigerFusedLinearGRPOLoss` by our kernels: the arguments of liger-kernel 0.8, and advantages that may be per token.

from sgcd_kernels.integrations.liger import LigerFusedLinearGRPOLoss
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgcd_kernels.logprob import linear_logprob
from sgcd_kernels.policy_loss import linear_policy_loss
from sgcd_kernels.validation import check_choice

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
LEVELS = ("token", "sequence")


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO-family loss of hidden states, called as liger-kernel's class of that name is.

    Args:
        beta, epsilon_low, epsilon_high, loss_type, max_completion_length, importance_sampling_level, temperature,
            use_ref_model: as there (for "cispo" epsilon_high is the cap of the ratio itself).
        compiled, chunk_size: accepted and not used; there are neither graphs nor chunks to choose.
        impl: the backend.
        others: what the "sapo", "vespo" and "luspo" losses take, accepted at any value as those losses are refused.

    Raises:
        ValueError: loss_type "sapo", "vespo" or "luspo"; importance_sampling_level "sequence" with another loss_type
            than "grpo"; delta or use_bias_correction_kl: at construction, not at the first step.

    >>> criterion = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="dapo")
    >>> hidden, weight = torch.zeros(2, 3, 4), torch.zeros(8, 4)
    >>> ids, mask, advantages = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), torch.tensor([1.0, -0.5])
    >>> loss, metrics = criterion(hidden, weight, ids, mask, advantages)
    >>> loss.item()  # on-policy: minus the mean advantage
    -0.25
    """

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
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        impl: str = "auto",
        **others: Any,
    ) -> None:
        super().__init__()
        check_choice("loss_type", loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", importance_sampling_level, LEVELS)
        if importance_sampling_level == "sequence" and loss_type != "grpo":
            raise ValueError(f"importance_sampling_level is 'sequence', needs loss_type 'grpo', got {loss_type!r}")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length is None, needs a number of tokens for loss_type 'dr_grpo'")
        if loss_type == "cispo" and epsilon_high < 1:
            raise ValueError(f"epsilon_high is {epsilon_high}, needs at least 1 for cispo: it is the cap of the ratio")
        for name, value in {"delta": delta, "use_bias_correction_kl": use_bias_correction_kl}.items():
            if value:
                raise ValueError(f"{name} is {value}, needs to be off: the policy loss has no such term")
        for name in others:
            if not name.startswith(("sapo_", "vespo_")):
                raise TypeError(f"{type(self).__name__} got an unexpected argument {name!r}")
        self.beta, self.temperature, self.impl, self.use_ref_model = beta, temperature, impl, use_ref_model
        self.loss_type = "gspo" if importance_sampling_level == "sequence" else loss_type
        self.max_completion_length = max_completion_length
        self.epsilon = epsilon_low, epsilon_high - 1 if loss_type == "cispo" else epsilon_high

    def forward(
        self,
        _input: Tensor,  # [B, T, H]
        lin_weight: Tensor,  # [V, H]
        selected_token_ids: Tensor,  # [B, T]
        attention_mask: Tensor,  # [B, T]; true where a token has a loss
        advantages: Tensor,  # [B], or [B, T] for one a token
        bias: Tensor | None = None,  # [V]
        ref_per_token_logps: Tensor | None = None,  # [B, T]
        old_per_token_logps: Tensor | None = None,  # [B, T]
        ref_input: Tensor | None = None,  # [B, T, H']
        ref_weight: Tensor | None = None,  # [V, H']
        ref_bias: Tensor | None = None,  # [V]
        vllm_is_ratio: Tensor | None = None,  # [B, T] or [B, 1]
        num_items_in_batch: float | Tensor | None = None,  # tokens
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss and its metrics: the k3 KL to the reference (if beta is not 0), the share of clipped tokens."""
        shape = selected_token_ids.shape
        if self.beta != 0 and self.use_ref_model and ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError("ref_input or ref_weight is None, and ref_per_token_logps too: beta needs a reference")
            with torch.no_grad():
                options = {"bias": ref_bias, "temperature": self.temperature, "impl": self.impl}
                states = ref_input.reshape(*shape, -1)
                ref_per_token_logps = linear_logprob(states, ref_weight, selected_token_ids, **options).logp  # type: ignore[arg-type]
        loss, metrics = linear_policy_loss(
            _input.reshape(*shape, -1),
            lin_weight,
            selected_token_ids,
            advantages,
            old_logp=old_per_token_logps,
            mask=attention_mask,
            loss_type=self.loss_type,
            epsilon=self.epsilon[0],
            epsilon_high=self.epsilon[1],
            beta=self.beta if ref_per_token_logps is not None else 0.0,
            ref_logp=ref_per_token_logps,
            importance_weights=None if vllm_is_ratio is None else vllm_is_ratio.expand(shape),
            temperature=self.temperature,
            bias=bias,
            num_items_in_batch=self._divisor(attention_mask, num_items_in_batch),
            impl=self.impl,
        )
        clipped = [metrics["clip_ratio/region_mean"]]
        return loss, [metrics.get("kl", torch.zeros_like(loss)), *clipped] if self.beta != 0 else clipped

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
        return (torch.as_tensor(num_items_in_batch, device=mask.device).float() / processes).clamp(min=1.0)
