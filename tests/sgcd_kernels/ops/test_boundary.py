"""What passes the checks on the way in, and what comes out of calls without values or with odd ones."""

from __future__ import annotations

import linecache
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sgcd_kernels import (
    CreditConfig,
    FusedLinearSGCDLoss,
    credit_weights,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)
from sgcd_kernels.credit.rules import never_acts
from sgcd_kernels.integrations.liger import LigerFusedLinearGRPOLoss

N, H, V = 6, 4, 9
G = torch.Generator().manual_seed(0)
X, W, T = torch.randn(N, H, generator=G), torch.randn(V, H, generator=G), torch.randn(N, H, generator=G)
Y, A, CU = torch.randint(V, (N,), generator=G), torch.randn(N, generator=G), torch.tensor([0, 2, N])


def test_calls_on_meta_alone_give_shapes() -> None:
    x, w, y, t, a, cu = (tensor.to("meta") for tensor in (X, W, Y, T, A, CU))
    one = torch.tensor(1.0, device="meta")
    results = [
        *linear_logprob(x, w, y, temperature=one),
        linear_divergence(x, w, y, t, temperature=torch.tensor(2.0)).reverse_kl,
        linear_policy_loss(x, w, y, a, cu_seqlens=cu, num_items_in_batch=one, beta=one, ref_logp=a)[0],
        linear_policy_loss(x, w, y, a, cu_seqlens=CU)[0],
        sgcd_loss(x, w, y, t, a, cu)[0],
        *credit_weights(a, a, cu),
    ]
    assert all(result.is_meta for result in results)
    assert {tuple(result.shape) for result in results} == {(N,), ()}


BESIDE = {"advantages": A, "cu_seqlens": CU, "num_items_in_batch": torch.tensor(3.0), "temperature": torch.tensor(0.5),
          "softcap": torch.tensor(9.0), "epsilon": torch.tensor(0.1), "has_teacher": torch.ones(2)}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_one_tensor_on_meta_is_refused_by_name(name: str) -> None:
    batch: dict[str, Any] = {"hidden": X, "weight": W, "targets": Y, "advantages": A, "cu_seqlens": CU}
    with pytest.raises(ValueError, match=f"{name} is on meta, needs cpu"):
        sgcd_loss(**{**batch, "teacher_hidden": T, name: BESIDE[name].to("meta")})


@pytest.mark.parametrize("name", ["divergence", "teacher_entropy", "mask", "turn_ids", "advantages", "log_ratio"])
def test_credit_refuses_one_tensor_on_meta(name: str) -> None:
    given = {"divergence": A.abs(), "teacher_entropy": A.abs(), "mask": A > 0, "turn_ids": Y, "advantages": A[:2]}
    given |= {"log_ratio": A}
    with pytest.raises(ValueError, match=r"is on (meta, needs cpu|cpu, needs meta)"):
        credit_weights(**{**given, "cu_seqlens": CU, name: given[name].to("meta")})  # type: ignore[arg-type]


def test_an_inert_step_is_warned_of_at_the_line_that_called() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sgcd_loss(X, W, Y, X, A, CU)  # this line
        FusedLinearSGCDLoss()(X, W, Y, X, A, CU)  # and this line
    assert [Path(w.filename).name for w in caught] == ["test_boundary.py"] * 2
    assert all("this line" in linecache.getline(w.filename, w.lineno) for w in caught)


@pytest.mark.parametrize(
    "fields",
    [
        {"gamma": 0.0},
        {"clip": 1.0},
        {"start": 1.0},
        {"rule": "none"},
        {"rule": "uniform", "clip": 1.0},
        {"rule": "gear", "gear_alpha": 0.0},
        {"rule": "rlsd", "rlsd_lambda": 0.0},
        {"rule": "rlsd", "rlsd_epsilon": 0.0},
        {"rule": "egrsd", "egrsd_epsilon": 0.0, "egrsd_gamma": 0.0},
        {"rule": "turn_level", "turn_epsilon": 0.0},
    ],
)
def test_settings_that_cannot_act(fields: dict[str, Any]) -> None:
    config = CreditConfig(**{"d_floor": 1e-3, "reset": 0.0, **fields})
    signals = {"advantages": A, "log_ratio": A, "turn_ids": Y}
    weights = credit_weights(A.abs(), A.abs(), CU, **signals, config=config).weights  # type: ignore[arg-type]
    torch.testing.assert_close(weights, torch.ones(N))
    assert never_acts(config)
    assert torch.equal(sgcd_loss(X, W, Y, T, A, CU, config=config)[0], linear_policy_loss(X, W, Y, A, cu_seqlens=CU)[0])


def test_settings_that_act() -> None:
    assert not any(never_acts(CreditConfig(rule=rule)) for rule in ("sgcd", "gear", "rlsd", "egrsd", "turn_level"))
    assert not never_acts(CreditConfig(rule="egrsd", egrsd_epsilon=0.0))
    assert not never_acts(CreditConfig(rule="dgpo", gamma=0.0))


def test_metrics_have_the_dtype_of_the_loss() -> None:
    loss, metrics = sgcd_loss(X, W, Y, T.double(), A, CU, teacher_weight=W.double(), config=CreditConfig(d_floor=1e-3))
    assert {value.dtype for value in (loss, *metrics.values())} == {torch.float32}


def test_messages_use_the_caller_s_names() -> None:
    with pytest.raises(ValueError, match="student_hidden has shape"):
        linear_divergence(X[0], W, Y, T)
    with pytest.raises(ValueError, match=r"teacher_hidden has leading shape \[5\], needs \[6\] as hidden"):
        sgcd_loss(X, W, Y, T[:5], A, CU)
    with pytest.raises(ValueError, match="divergence, computed from hidden and teacher_hidden, holds 6 NaN"):
        sgcd_loss(X * torch.nan, W, Y, T, A, CU)


@pytest.mark.parametrize("value", [None, torch.zeros(2, dtype=torch.bool), "1", 0.0, torch.tensor(1j)])
def test_the_module_checks_its_temperature(value: Any) -> None:
    with pytest.raises(ValueError, match="temperature is"):
        FusedLinearSGCDLoss(temperature=value)


@pytest.mark.parametrize("items", [-1, -5.5, torch.tensor(-3), float("nan"), torch.tensor(float("nan")), "7"])
def test_liger_refuses_a_wrong_number_of_items(items: Any) -> None:
    batch = X.view(2, 3, H), W, Y.view(2, 3), torch.ones(2, 3), A.view(2, 3)
    with pytest.raises(ValueError, match="num_items_in_batch is"):
        LigerFusedLinearGRPOLoss(beta=0.0)(*batch, num_items_in_batch=items)


@pytest.mark.parametrize("value", [1e308, 5e-324, 10**400, True, "1", None])
def test_numbers_beyond_fp32_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature is .*, needs a finite number in \[1e-20, 1e\+20\]"):
        linear_logprob(X, W, Y, temperature=value)


def test_the_ends_of_the_range_give_what_they_mean() -> None:
    flat, sharp = (linear_logprob(X, W, Y, temperature=t).logp for t in (1e20, 1e-20))
    torch.testing.assert_close(flat, torch.full((N,), -1.0) * torch.tensor(V).log())
    assert sharp.isfinite().all()
    torch.testing.assert_close(linear_logprob(X, W, Y, softcap=1e20).logp, linear_logprob(X, W, Y).logp)
