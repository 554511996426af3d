"""Credit in verl on one batch, without Ray: the computation of its actor with `loss_mode: sgcd`, step by step.

python examples/verl/policy_loss.py        needs verl 0.9 (docs/verl.md)
"""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass

import sgcd_kernels.integrations.verl.register  # noqa: F401  # what external_lib does in every worker
from sgcd_kernels.integrations.verl.credit import credit_config, credit_metrics, response_credit
from sgcd_kernels.integrations.verl.policy_loss import TokenWeights, token_weights

with initialize_config_dir(str(Path(__file__).resolve().parent), version_base=None):
    config = compose("sgcd").actor_rollout_ref
actor = omega_conf_to_dataclass(config.actor)

# Two responses of 8 tokens, padded as in verl; the middle of the first is a tool's answer.
generator = torch.Generator().manual_seed(0)
mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
old = -torch.rand(2, 8, generator=generator) * 2
new = (old + 0.1 * torch.randn(2, 8, generator=generator)).requires_grad_()
advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 8) * mask

# The engine measures these in its forward pass: KL(student || teacher) and the teacher's entropy per token.
signals = {"reverse_kl": torch.zeros(2, 8), "teacher_entropy": torch.rand(2, 8, generator=generator)}
signals["reverse_kl"][0, 5], signals["reverse_kl"][1, 1] = 0.9, 0.4  # where the teacher disagrees

rule = credit_config(config.model.fused_kernel_options.sgcd)
credit = response_credit(signals, mask, config=rule)
given = TokenWeights(credit.weights, credit_metrics(credit, signals, mask, rule))
for mode in ("vanilla", actor.policy_loss.loss_mode):
    with token_weights(given):
        loss, metrics = get_policy_loss_fn(mode)(old, new, advantages, mask, actor.loss_agg_mode, config=actor)
    slope = torch.autograd.grad(loss, new)[0]
    print(f"{mode:8} loss {loss:.4f}  slope at the tokens", [round(x, 3) for x in slope[0].tolist()])
print(f"mean W {metrics['credit/mean_weight']:.3f}  W of the first response", credit.weights[0].tolist())
