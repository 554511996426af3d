"""The keywords of a policy loss: one by one, as a PolicyLossConfig, or both; and what is none."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from sgcd_kernels import FusedLinearSGCDLoss, PolicyLossConfig, linear_logprob, linear_policy_loss, sgcd_loss
from sgcd_kernels.core.surrogate import LOSS_TYPES

N, H, V = 12, 5, 30
G = torch.Generator().manual_seed(0)
X, T, W = (torch.randn(n, H, generator=G, dtype=torch.float64) for n in (N, N, V))
Y, CU = torch.randint(V, (N,), generator=G), torch.tensor([0, 5, N])
OLD = linear_logprob(X, W, Y).logp + 0.5 * torch.randn(N, generator=G, dtype=torch.float64)
BATCH: dict[str, Any] = {
    "hidden": X, "weight": W, "targets": Y, "advantages": torch.tensor([1.0, -1.0]), "cu_seqlens": CU,
    "old_logp": OLD, "ref_logp": OLD + 0.1,
}  # fmt: skip


def plain(**options: Any) -> torch.Tensor:
    return linear_policy_loss(**BATCH, **options)[0]


def weighted(**options: Any) -> torch.Tensor:
    return sgcd_loss(**BATCH, teacher_hidden=T, turn_ids=torch.arange(N) // 4, **options)[0]


FIELDS: dict[str, Any] = {
    "loss_type": "dapo",
    "epsilon": 0.05,
    "epsilon_high": 0.4,
    "beta": 0.3,
    "num_items_in_batch": 5.0,
}


@pytest.mark.parametrize("loss", [plain, weighted])
class TestPolicy:
    def test_a_whole_policy_is_its_fields(self, loss: Any) -> None:
        assert torch.equal(loss(policy=PolicyLossConfig(**FIELDS)), loss(**FIELDS))
        assert torch.equal(loss(policy=PolicyLossConfig()), loss())

    @pytest.mark.parametrize("field", FIELDS)
    def test_keywords_override_its_fields(self, loss: Any, field: str) -> None:
        others = {name: value for name, value in FIELDS.items() if name != field}
        ours = loss(policy=PolicyLossConfig(**others), **{field: FIELDS[field]})
        assert torch.equal(ours, loss(**FIELDS))
        assert not torch.equal(ours, loss(policy=PolicyLossConfig(**others)))

    def test_none_overrides_too(self, loss: Any) -> None:
        policy = PolicyLossConfig(epsilon=0.1, epsilon_high=0.4, num_items_in_batch=3.0)
        assert torch.equal(loss(policy=policy, epsilon_high=None, num_items_in_batch=None), loss(epsilon=0.1))

    @pytest.mark.parametrize("wrong", [{"loss_type": "dapo"}, "dapo", None])
    def test_what_is_no_policy_is_refused(self, loss: Any, wrong: Any) -> None:
        needs = f"policy is {wrong!r} ({type(wrong).__name__}), needs a PolicyLossConfig"
        with pytest.raises(ValueError, match=re.escape(needs)):
            loss(policy=wrong)

    def test_an_unknown_keyword_is_a_type_error_that_names_it(self, loss: Any) -> None:
        name = "linear_policy_loss" if loss is plain else "sgcd_loss"
        with pytest.raises(TypeError, match=re.escape(f"{name}() got an unexpected keyword argument 'losstype'")):
            loss(losstype="dapo", epsilon=0.1)

    @pytest.mark.parametrize("keyword", ["lse", "teacher_hiden", "features"])
    def test_keywords_of_other_ops_are_unknown(self, loss: Any, keyword: str) -> None:
        if loss is plain and keyword == "lse":
            return
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            loss(**{keyword: None})

    def test_a_number_of_items_may_be_a_tensor(self, loss: Any) -> None:
        assert torch.equal(loss(num_items_in_batch=torch.tensor(5)), loss(num_items_in_batch=5))
        with pytest.raises(
            ValueError, match=r"num_items_in_batch is -?0.*, needs a finite number in \[1e-20, 1e\+20\]"
        ):
            loss(num_items_in_batch=torch.tensor(0))

    def test_wrong_fields_are_refused_as_keywords_too(self, loss: Any) -> None:
        for name, value in WRONG:
            with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}, needs"):
                loss(**{name: value})


WRONG: list[tuple[str, Any]] = [
    ("loss_type", "drgrpo"),
    ("epsilon", -0.1),
    ("epsilon", "0.2"),
    ("epsilon", float("nan")),
    ("epsilon_high", -0.1),
    ("beta", -1.0),
    ("beta", None),
    ("num_items_in_batch", 0),
    ("num_items_in_batch", "all"),
    ("num_items_in_batch", float("inf")),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_fields_are_refused_when_it_is_made(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}, needs"):
        PolicyLossConfig(**{name: value})


def test_it_is_frozen_and_has_no_other_field() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PolicyLossConfig().beta = 0.1  # type: ignore[misc]
    with pytest.raises(TypeError, match="losstype"):
        PolicyLossConfig(losstype="dapo")  # type: ignore[call-arg]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_epsilon_high_is_epsilon_where_none_is_given(loss_type: str) -> None:
    assert PolicyLossConfig(loss_type, epsilon=0.3).clip_high == 0.3
    assert PolicyLossConfig(loss_type, epsilon=0.3, epsilon_high=0.1).clip_high == 0.1
    assert torch.equal(
        plain(loss_type=loss_type, epsilon=0.3), plain(loss_type=loss_type, epsilon=0.3, epsilon_high=0.3)
    )


def test_the_module_has_the_defaults_of_the_function() -> None:
    bound = FusedLinearSGCDLoss().bound()
    policy = dataclasses.asdict(PolicyLossConfig())
    assert {name: bound[name] for name in policy if name in bound} == {k: v for k, v in policy.items() if k in bound}
