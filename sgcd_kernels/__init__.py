"""Token-credit kernels: log-probs, divergences, credit weights and policy losses straight from hidden states.

Nothing here ever holds an [N, V] matrix of logits. Importing loads PyTorch and nothing heavier; backends load on use.
"""

from sgcd_kernels.backends import backend_status
from sgcd_kernels.credit import credit_weights
from sgcd_kernels.credit_config import CreditConfig
from sgcd_kernels.distill_loss import linear_distill_loss
from sgcd_kernels.divergence import linear_divergence
from sgcd_kernels.logprob import linear_logprob
from sgcd_kernels.model_check import check_model
from sgcd_kernels.modules import FusedLinearSGCDLoss
from sgcd_kernels.policy_loss import linear_policy_loss
from sgcd_kernels.sgcd import sgcd_loss
from sgcd_kernels.types import Credit, DivergenceStats, LogprobStats

__all__ = [
    "Credit",
    "CreditConfig",
    "DivergenceStats",
    "FusedLinearSGCDLoss",
    "LogprobStats",
    "backend_status",
    "check_model",
    "credit_weights",
    "linear_distill_loss",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "sgcd_loss",
]
