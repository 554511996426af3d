"""Token-credit kernels: log-probs, divergences, credit weights and policy losses straight from hidden states.

No op writes an [N, V] matrix of logits; docs/api.md gives the peak workspace of each. Importing loads PyTorch and
nothing heavier: backends load on first use.
"""

from sgcd_kernels.backends.registry import backend_status
from sgcd_kernels.core.surrogate import PolicyLossConfig
from sgcd_kernels.credit.config import CreditConfig
from sgcd_kernels.credit.rules import Credit
from sgcd_kernels.credit.weights import credit_weights
from sgcd_kernels.measured_head import OutputHead, output_head
from sgcd_kernels.models import check_model
from sgcd_kernels.ops.distill_loss import linear_distill_loss
from sgcd_kernels.ops.divergence import DivergenceStats, linear_divergence
from sgcd_kernels.ops.logprob import LogprobStats, linear_logprob
from sgcd_kernels.ops.policy_loss import linear_policy_loss
from sgcd_kernels.ops.sgcd import FusedLinearSGCDLoss, sgcd_loss
from sgcd_kernels.packing import PackedTokens, pack_tokens

__version__ = "0.1.0"

__all__ = [
    "Credit",
    "CreditConfig",
    "DivergenceStats",
    "FusedLinearSGCDLoss",
    "LogprobStats",
    "OutputHead",
    "PackedTokens",
    "PolicyLossConfig",
    "backend_status",
    "check_model",
    "credit_weights",
    "linear_distill_loss",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "output_head",
    "pack_tokens",
    "sgcd_loss",
]
