"""The plain-PyTorch backend: runs anywhere, in bounded memory. See `blocks` for how the work is cut."""

from sgcd_kernels.torch_backend.distill import distill_backward
from sgcd_kernels.torch_backend.divergence import divergence_forward
from sgcd_kernels.torch_backend.logprob import logprob_backward, logprob_forward, target_logp

__all__ = ["distill_backward", "divergence_forward", "logprob_backward", "logprob_forward", "target_logp"]
