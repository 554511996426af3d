"""Our class under Liger's name against Liger's, loss type by loss type: loss, metrics, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sgcd_kernels import linear_policy_loss
from sgcd_kernels.integrations.liger import LigerFusedLinearGRPOLoss

theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")

B, T, H, V = 3, 7, 12, 50


def inputs() -> dict[str, Any]:
    torch.manual_seed(0)
    mask = torch.rand(B, T) > 0.3
    mask[:, 0] = True
    return {
        "_input": torch.randn(B, T, H),
        "lin_weight": torch.randn(V, H),
        "selected_token_ids": torch.randint(V, (B, T)),
        "attention_mask": mask,
        "advantages": torch.tensor([1.0, -0.5, 0.7]),
        "bias": torch.randn(V),
        "old_per_token_logps": -4 + torch.randn(B, T),
    }


def run(loss_class: Any, options: dict[str, Any], more: dict[str, Any]) -> tuple[Any, ...]:
    given = inputs() | more
    leaves = [given[name].clone().requires_grad_() for name in ("_input", "lin_weight", "bias")]
    given |= dict(zip(("_input", "lin_weight", "bias"), leaves))
    loss, metrics = loss_class(**options)(**given)
    return loss, metrics, torch.autograd.grad(loss, leaves)


NO_REFERENCE = {"beta": 0.0, "use_ref_model": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dapo": (NO_REFERENCE, {}),
    "grpo": (NO_REFERENCE | {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.3}, {}),
    "bnpo": (NO_REFERENCE | {"loss_type": "bnpo", "temperature": 0.7}, {}),
    "dr_grpo": (NO_REFERENCE | {"loss_type": "dr_grpo", "max_completion_length": 20}, {}),
    "cispo": (NO_REFERENCE | {"loss_type": "cispo", "epsilon_high": 5.0}, {}),
    "gspo": (NO_REFERENCE | {"loss_type": "grpo", "importance_sampling_level": "sequence"}, {}),
    "on-policy": (NO_REFERENCE, {"old_per_token_logps": None}),
    "kl": ({"beta": 0.1}, {"ref_per_token_logps": -4 + torch.linspace(-1, 1, B * T).view(B, T)}),
    "reference model": (
        {},
        {"ref_input": torch.linspace(-1, 1, B * T * H).view(B, T, H), "ref_weight": torch.eye(V, H)},
    ),
    "no reference model": ({"use_ref_model": False}, {}),
    "importance weights": (NO_REFERENCE, {"vllm_is_ratio": torch.tensor([[0.5], [1.0], [2.0]])}),
    "items": (NO_REFERENCE, {"num_items_in_batch": 40}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_import_may_be_changed(name: str) -> None:
    options, more = CASES[name]
    loss, metrics, grads = run(LigerFusedLinearGRPOLoss, options, more)
    want, their_metrics, their_grads = run(theirs.LigerFusedLinearGRPOLoss, options | {"compiled": False}, more)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(list(metrics), list(their_metrics), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads, their_grads, rtol=1e-4, atol=1e-6)


def test_advantages_of_one_a_token() -> None:
    advantages = torch.randn(B, T, generator=torch.Generator().manual_seed(1))
    given = inputs() | {"advantages": advantages}
    loss, _ = LigerFusedLinearGRPOLoss(beta=0.0)(**given)
    want, _ = linear_policy_loss(
        given["_input"],
        given["lin_weight"],
        given["selected_token_ids"],
        advantages,
        old_logp=given["old_per_token_logps"],
        mask=given["attention_mask"],
        bias=given["bias"],
        loss_type="dapo",
    )
    assert torch.equal(loss, want)
    assert not torch.equal(loss, LigerFusedLinearGRPOLoss(beta=0.0)(**inputs())[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sapo"}, "loss_type"),
        ({"importance_sampling_level": "sequence"}, "needs loss_type 'grpo'"),
        ({"delta": 2.0}, "delta is 2.0"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"loss_type": "cispo"}, "epsilon_high"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)


def test_a_reference_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="ref_input or ref_weight is None"):
        LigerFusedLinearGRPOLoss(beta=0.1)(**inputs())
