"""Every refusal names the argument and what it needs."""

from __future__ import annotations

import re

import pytest
import torch

from sgcd_kernels import (
    FusedLinearSGCDLoss,
    backend_status,
    credit_weights,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)

X, W, Y = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
A, CU = torch.randn(6), torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("hidden has shape [4], needs [N, H] or [B, T, H]", {"hidden": X[0]}),
        ("hidden is torch.int64, needs a float dtype", {"hidden": X.long()}),
        ("weight has shape [9, 3], needs [V, 4]", {"weight": W[:, :3]}),
        ("weight has shape [0, 4], needs [V, 4] with V > 0", {"weight": W[:0]}),
        ("bias has shape [8], needs [9]", {"bias": torch.zeros(8)}),
        ("bias is torch.int64, needs a float dtype", {"bias": torch.zeros(9, dtype=torch.long)}),
        ("group is a str, needs a torch.distributed.ProcessGroup or None; of a DeviceMesh", {"group": "tp"}),
        ("targets has shape [5], needs [6]", {"targets": Y[:5]}),
        ("targets is torch.float32, needs an integer dtype", {"targets": Y.float()}),
        ("targets holds 9, needs 0 <= y < 9", {"targets": torch.full((6,), 9)}),
        ("targets holds -1, needs 0 <= y < 9", {"targets": torch.full((6,), -1)}),
        ("temperature is 0.0, needs a finite number in [1e-20, 1e+20]", {"temperature": 0.0}),
        ("temperature is nan", {"temperature": float("nan")}),
        ("temperature holds -1.0, needs numbers in [1e-20, 1e+20]", {"temperature": torch.full((6,), -1.0)}),
        ("temperature has shape [5], needs [6]", {"temperature": torch.ones(5)}),
        ("softcap is -1.0", {"softcap": -1.0}),
        ("impl is 'torhc', needs one of auto, triton, cpp, torch; did you mean 'torch'?", {"impl": "torhc"}),
        ("targets is on meta, needs cpu", {"targets": Y.to("meta")}),
        ("weight is on meta, needs cpu", {"weight": W.to("meta")}),
    ],
)
def test_logprob(message: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_logprob(**{"hidden": X, "weight": W, "targets": Y} | arguments)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("teacher_hidden has leading shape [5], needs [6]", {"teacher_hidden": X[:5]}),
        ("teacher_weight has V = 8, needs V = 9", {"teacher_weight": W[:8]}),
        ("teacher_weight has shape [9, 4], needs [V, 3]", {"teacher_hidden": X[:, :3]}),
        ("features is 'jds', needs one of jsd, tv; did you mean 'jsd'?", {"features": ("jds",)}),
        ("beta is 2.0", {"beta": 2.0}),
        ("top_k is 10, needs an integer in [1, 9]", {"top_k": 10}),
        ("top_k is 0", {"top_k": 0}),
        ("top_k is 4.0, needs an integer", {"top_k": 4.0}),
        ("top_k is True, needs an integer", {"top_k": True}),
        ("features is 'jsd', a string; needs a sequence of names", {"features": "jsd"}),
        ("beta is 0.0, needs 1e-06 <= beta <= 1 - 1e-06 for a jsd", {"features": ("jsd",), "beta": 0.0}),
        ("use forward_kl or reverse_kl", {"features": ("jsd",), "beta": 1 - 1e-9}),
        ("teacher_hidden is None (NoneType), needs a tensor", {"teacher_hidden": None}),
    ],
)
def test_divergence(message: str, arguments: dict) -> None:
    inputs = {"student_hidden": X, "weight": W, "targets": Y, "teacher_hidden": X}
    if arguments.get("teacher_hidden") is not None and arguments["teacher_hidden"].shape[1] != 4:
        inputs["teacher_weight"] = W
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_divergence(**inputs | arguments)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (
            "loss_type is 'drgrpo', needs one of grpo, bnpo, dr_grpo, dapo, cispo, gspo; did you mean",
            {"loss_type": "drgrpo"},
        ),
        ("cu_seqlens is None, needs [B + 1] for loss_type 'grpo'", {"cu_seqlens": None}),
        ("cu_seqlens goes from 0 to 5, needs to rise from 0 to 6", {"cu_seqlens": torch.tensor([0, 5])}),
        ("cu_seqlens goes from 0 to 6, needs to rise", {"cu_seqlens": torch.tensor([0, 4, 2, 6])}),
        ("cu_seqlens is [2] torch.float32", {"cu_seqlens": torch.tensor([0.0, 6.0])}),
        ("advantages has shape [3], needs [6] (per token) or [2] (per sequence)", {"advantages": A[:3]}),
        ("mask has shape [5], needs [6]", {"mask": torch.ones(5)}),
        ("old_logp has shape [5], needs [6]", {"old_logp": A[:5]}),
        ("ref_logp is None, needs the reference policy's log-probs for beta 0.1", {"beta": 0.1}),
        ("epsilon is -0.1", {"epsilon": -0.1}),
        ("epsilon is '0.2', needs a finite number", {"epsilon": "0.2"}),
        ("cu_seqlens is [0, 2, 6] (list), needs a tensor", {"cu_seqlens": [0, 2, 6]}),
        ("advantages is [1.0, 2.0] (list), needs a tensor", {"advantages": [1.0, 2.0]}),
        ("num_items_in_batch is 'all'", {"num_items_in_batch": "all"}),
        ("num_items_in_batch is 0, needs a finite number in [1e-20, 1e+20]", {"num_items_in_batch": 0}),
        ("cu_seqlens is given with hidden [B, T, H]", {"hidden": X.view(2, 3, 4), "targets": Y.view(2, 3)}),
    ],
)
def test_policy_loss(message: str, arguments: dict) -> None:
    inputs = {"hidden": X, "weight": W, "targets": Y, "advantages": A, "cu_seqlens": CU}
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_policy_loss(**inputs | arguments)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("kind is 'reverse-kl', needs one of", {"kind": "reverse-kl"}),
        ("reduction is 'avg'", {"reduction": "avg"}),
        (
            "beta is 0.0, needs 1e-06 <= beta <= 1 - 1e-06 for a jsd; for beta 0 or 1 as TRL means them use forward_kl",
            {"kind": "jsd", "beta": 0.0},
        ),
    ],
)
def test_distill_loss(message: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_distill_loss(X, W, X, **arguments)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("divergence has shape [2, 3], needs packed [N]", {"divergence": A.view(2, 3)}),
        ("teacher_entropy has shape [5], needs [6]", {"teacher_entropy": A[:5]}),
        ("divergence holds 1 NaN or infinite values", {"divergence": torch.tensor([1.0, 2, torch.nan, 3, 4, 5])}),
        ("turn_ids has shape [5]", {"turn_ids": torch.zeros(5)}),
        ("advantages has shape [4], needs [6] (per token) or [2] (per sequence)", {"advantages": A[:4]}),
        ("cu_seqlens goes from 0 to 5", {"cu_seqlens": torch.tensor([0, 5])}),
        ("cu_seqlens is None (NoneType), needs a tensor", {"cu_seqlens": None}),
        ("config is {'gamma': 1.0} (dict), needs a CreditConfig", {"config": {"gamma": 1.0}}),
    ],
)
def test_credit_weights(message: str, arguments: dict) -> None:
    inputs = {"divergence": A.abs(), "teacher_entropy": A.abs(), "cu_seqlens": CU}
    with pytest.raises(ValueError, match=re.escape(message)):
        credit_weights(**inputs | arguments)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("targets has shape [5], needs [6]", {"targets": Y[:5]}),
        ("config is {'gamma': 1.0} (dict), needs a CreditConfig", {"config": {"gamma": 1.0}}),
        ("loss_type is 'drgrpo'", {"loss_type": "drgrpo"}),
        ("epsilon is '0.2'", {"epsilon": "0.2"}),
        ("ref_logp is None", {"beta": 0.1}),
        ("advantages has shape [3], needs [6] (per token) or [2] (per sequence)", {"advantages": A[:3]}),
        ("advantages is None (NoneType), needs a tensor", {"advantages": None}),
        ("cu_seqlens is [0, 2, 6] (list), needs a tensor", {"cu_seqlens": [0, 2, 6]}),
        ("cu_seqlens goes from 0 to 5", {"cu_seqlens": torch.tensor([0, 5]), "loss_type": "dapo"}),
        ("mask has shape [5], needs [6]", {"mask": torch.ones(5)}),
        ("credit_mask has shape [5], needs [6]", {"credit_mask": torch.ones(5)}),
        ("turn_ids has shape [5], needs [6]", {"turn_ids": torch.ones(5)}),
        ("old_logp has shape [5], needs [6]", {"old_logp": A[:5]}),
    ],
)
def test_sgcd_refuses_before_it_scores(message: str, arguments: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(*args: object, **kwargs: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr("sgcd_kernels.ops.sgcd.divergence_op", score)
    inputs = {"hidden": X, "weight": W, "targets": Y, "teacher_hidden": X, "advantages": A, "cu_seqlens": CU}
    with pytest.raises(ValueError, match=re.escape(message)):
        sgcd_loss(**inputs | arguments)


def test_module_names_the_nearest_hyperparameter() -> None:
    with pytest.raises(ValueError, match=r"hyperparameter is 'losstype'.*did you mean 'loss_type'"):
        FusedLinearSGCDLoss(losstype="grpo")


@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_unusable_backend_says_why(impl: str) -> None:
    status = backend_status()
    assert status["torch"].usable
    if not status[impl].usable:
        with pytest.raises(ValueError, match=f"impl is '{impl}', which cannot run .*{re.escape(status[impl].reason)}"):
            linear_logprob(X, W, Y, impl=impl)
