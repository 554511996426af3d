"""The composition: bitwise GRPO where there is no credit, W times the GRPO loss where there is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from sgcd_kernels import (
    CreditConfig,
    FusedLinearSGCDLoss,
    credit_weights,
    linear_divergence,
    linear_policy_loss,
    sgcd_loss,
)
from sgcd_kernels.core.surrogate import LOSS_TYPES
from sgcd_kernels.ops import sgcd

N, H, V = 40, 6, 90
CU = torch.tensor([0, 12, 12, 25, 40])


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    x, w = torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    return {
        "hidden": x.clone().requires_grad_(),
        "weight": w.requires_grad_(),
        "targets": torch.randint(V, (N,)),
        "teacher_hidden": x + 0.3 * torch.randn(N, H, dtype=dtype) * (torch.rand(N, 1) < 0.3),
        "advantages": torch.tensor([1.0, 0.3, -1.0, 0.5], dtype=dtype),
        "cu_seqlens": CU,
        "mask": torch.rand(N) < 0.8,
    }


def grpo(inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    plain = {k: v for k, v in inputs.items() if k not in ("teacher_hidden", "credit_mask")}
    return linear_policy_loss(**plain, **options)[0]


def bits(loss: torch.Tensor, inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, (inputs["hidden"], inputs["weight"]))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("why", ["divergence", "credit_mask", "d_floor"])
@pytest.mark.filterwarnings("ignore:credit is inert")
def test_weights_of_one_give_grpo_bitwise(why: str, loss_type: str, dtype: torch.dtype) -> None:
    """Where only the data shows that credit does nothing; where the host knows it: test_sgcd_unscored."""
    inputs = batch(dtype)
    config = CreditConfig(d_floor=1e6) if why == "d_floor" else CreditConfig()
    if why == "divergence":
        inputs["teacher_hidden"] = inputs["hidden"].detach().clone()
    if why == "credit_mask":
        inputs["credit_mask"] = torch.zeros(N)
    loss, metrics = sgcd_loss(**inputs, config=config, loss_type=loss_type)
    for ours, plain in zip(bits(loss, inputs), bits(grpo(inputs, loss_type=loss_type), inputs)):
        assert torch.equal(ours, plain)
    assert metrics["credit/inert"] == (why != "credit_mask")  # there no token was eligible
    assert metrics["credit/mean_weight"] == 1


def test_loss_is_weight_times_grpo_token_by_token() -> None:
    """One token a call, so that each token's loss and gradient can be seen."""
    inputs = batch(torch.float64)
    stats = linear_divergence(*(inputs[k] for k in ("hidden", "weight", "targets", "teacher_hidden")))
    w = credit_weights(stats.reverse_kl, stats.teacher_entropy, CU, mask=inputs["mask"]).weights
    assert (w > 1).any()
    assert (w == 1).any()
    a = inputs["advantages"].repeat_interleave(CU.diff())
    old = stats.student_logp + 0.2 * torch.randn(N, dtype=torch.float64)
    for t in range(N):
        one = {
            "weight": inputs["weight"],
            "hidden": inputs["hidden"][t : t + 1],
            "targets": inputs["targets"][t : t + 1],
        }
        one |= {"old_logp": old[t : t + 1], "loss_type": "dapo"}
        plain, _ = linear_policy_loss(**one, advantages=a[t : t + 1])
        ours, _ = linear_policy_loss(**one, advantages=(a * w)[t : t + 1])
        torch.testing.assert_close(ours, w[t] * plain, rtol=1e-14, atol=0)
        gradients = [torch.autograd.grad(x, inputs["weight"])[0] for x in (ours, plain)]
        torch.testing.assert_close(gradients[0], w[t] * gradients[1], rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("reuse_lse", [False, True])
def test_equals_its_three_parts(reuse_lse: bool) -> None:
    inputs = batch(torch.float64)
    turns = torch.arange(N) // 5
    eligible = inputs["mask"] & (torch.arange(N) % 7 != 0)
    options: dict[str, Any] = {"loss_type": "dapo", "epsilon": 0.1, "temperature": 0.8, "softcap": 8.0}
    loss, metrics = sgcd_loss(**inputs, credit_mask=eligible, turn_ids=turns, reuse_lse=reuse_lse, **options)
    stats = linear_divergence(
        *(inputs[k] for k in ("hidden", "weight", "targets", "teacher_hidden")), temperature=0.8, softcap=8.0
    )
    credit = credit_weights(stats.reverse_kl, stats.teacher_entropy, CU, mask=eligible, turn_ids=turns)
    weighted = inputs | {"advantages": inputs["advantages"].repeat_interleave(CU.diff()) * credit.weights}
    torch.testing.assert_close(loss, grpo(weighted, **options), rtol=1e-12, atol=1e-14)
    assert metrics["credit/mean_weight"] == pytest.approx(credit.weights[eligible].mean().item())
    assert metrics["credit/mean_divergence"] == pytest.approx(stats.reverse_kl[eligible].mean().item())
    assert metrics["credit/frac_salient"] == pytest.approx((credit.saliency[eligible] > 0).double().mean().item())
    assert metrics["credit/num_spans"] == credit.span_ids.max() + 1
    assert metrics["entropy"] == pytest.approx(stats.student_entropy[inputs["mask"]].mean().item())
    assert metrics["credit/inert"] == 0


def test_teacher_gets_no_gradient() -> None:
    inputs = batch()
    inputs["teacher_hidden"].requires_grad_()
    teacher_weight = torch.randn(V, H, requires_grad=True)
    sgcd_loss(**inputs, teacher_weight=teacher_weight)[0].backward()
    assert inputs["teacher_hidden"].grad is None
    assert teacher_weight.grad is None
    assert inputs["hidden"].grad is not None


def test_inert_credit_warns_and_intended_silence_does_not() -> None:
    inputs = batch()
    inputs["teacher_hidden"] = inputs["hidden"].detach().clone()
    with pytest.warns(RuntimeWarning, match="credit is inert: all divergences are 0"):
        sgcd_loss(**inputs)
    with pytest.warns(RuntimeWarning, match="credit is inert: all weights are 1"):
        sgcd_loss(**batch(), config=CreditConfig(d_floor=1e6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgcd_loss(**inputs, config=CreditConfig(rule="none"))
        sgcd_loss(**inputs, config=CreditConfig(gamma=0.0))
        sgcd_loss(**inputs | {"mask": torch.zeros(N)})
        sgcd_loss(**batch())


def divergent(**signals: Any) -> list[Any]:
    """sgcd_loss where the teacher agrees: (loss, GRPO's loss, metrics, warnings)."""
    inputs = batch() | {"advantages": torch.ones(4)}
    inputs["teacher_hidden"] = inputs["hidden"].detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss, metrics = sgcd_loss(**inputs, **signals)
    return [loss, grpo(inputs), metrics, [str(w.message) for w in caught]]


@pytest.mark.parametrize(
    "rule", ["uniform", "sc_grpo", "egrsd", "gear", "dgpo", "turn_level", "rlsd", "permuted", "matched_uniform"]
)
@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_inert_credit_is_called_grpo_only_where_it_is(rule: str, gamma: float) -> None:
    loss, plain, metrics, said = divergent(config=CreditConfig(rule=rule, gamma=gamma))
    if gamma == 0 and rule in ("uniform", "permuted", "matched_uniform"):
        assert not said and "credit/inert" not in metrics  # as it was asked to be, and nothing was scored
        return
    assert metrics["credit/inert"] == 1
    assert len(said) == 1
    assert said[0].startswith("credit is inert: all divergences are 0 over ")
    assert said[0].endswith("so this is plain GRPO") == torch.equal(loss, plain)
    assert torch.equal(loss, plain) == (metrics["credit/mean_weight"] == 1)


def test_without_an_eligible_token_credit_is_absent_not_inert() -> None:
    _, _, metrics, said = divergent(credit_mask=torch.zeros(N))
    assert metrics["credit/mean_weight"] == 1
    assert metrics["credit/inert"] == 0
    assert not said


@pytest.mark.parametrize("packed", [True, False])
def test_without_turn_ids_a_span_ends_with_its_run_of_loss_tokens(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 generated tokens, 40 observed, 20 generated, twice; the teacher disagrees at token 5. Literals end no turn."""
    t, v = 68, 50
    w = torch.eye(v) * 6
    x = torch.eye(v)[torch.zeros(2 * t).long()]
    teacher, mask, credit_mask = x.clone(), torch.ones(2 * t), torch.ones(2 * t)
    for start in (0, t):
        teacher[start + 5] = torch.eye(v)[1]
        mask[start + 8 : start + 48] = 0
        credit_mask[start + 6] = 0
    seen, op = [], sgcd.credit_op
    monkeypatch.setattr(sgcd, "credit_op", lambda *arguments: seen.append(op(*arguments)) or seen[0])
    shape = (lambda value: value) if packed else (lambda value: value.reshape(2, t, *value.shape[1:]))
    per_token = [shape(value) for value in (x, torch.zeros(2 * t).long(), teacher)]
    cu = torch.tensor([0, t, 2 * t]) if packed else None
    sgcd_loss(
        per_token[0], w, per_token[1], per_token[2], torch.ones(2), cu, shape(mask), credit_mask=shape(credit_mask)
    )
    assert (seen[0].weights > 1).nonzero().squeeze(1).tolist() == [5, 7, t + 5, t + 7]


def test_masked_targets_may_be_anything() -> None:
    inputs = batch()
    want, _ = sgcd_loss(**inputs)
    inputs["targets"] = inputs["targets"].masked_fill(~inputs["mask"], -1)
    assert torch.equal(sgcd_loss(**inputs)[0], want)


@pytest.mark.parametrize(
    "rule", ["gear", "rlsd", "sc_grpo", "egrsd", "dgpo", "turn_level", "uniform", "matched_uniform", "permuted"]
)
def test_every_rule_runs_through_the_composition(rule: str) -> None:
    inputs = batch()
    loss, metrics = sgcd_loss(**inputs, config=CreditConfig(rule=rule))
    assert loss.isfinite()
    assert metrics["credit/inert"] == 0
    assert not torch.equal(loss, grpo(inputs))


def test_padded_batch_equals_packed() -> None:
    inputs = batch() | {"cu_seqlens": torch.arange(0, 41, 10)}
    shaped = {
        k: v.reshape(4, 10, *v.shape[1:])
        for k, v in inputs.items()
        if k in ("hidden", "targets", "teacher_hidden", "mask")
    }
    padded = {k: v for k, v in inputs.items() if k != "cu_seqlens"} | shaped
    assert torch.equal(sgcd_loss(**inputs)[0], sgcd_loss(**padded)[0])


def test_module_is_the_function() -> None:
    inputs = batch()
    config = CreditConfig(gamma=0.5)
    module = FusedLinearSGCDLoss(config=config, loss_type="dapo", epsilon_high=0.28)
    names = ("hidden", "weight", "targets", "teacher_hidden", "advantages", "cu_seqlens", "mask")
    loss, metrics = module(*(inputs[k] for k in names))
    want, _ = sgcd_loss(**inputs, config=config, loss_type="dapo", epsilon_high=0.28)
    assert torch.equal(loss, want)
    assert "credit/mean_weight" in metrics
    assert "loss_type=dapo" in repr(module)
    assert not list(module.parameters())


def test_packed_tokens_need_sequence_bounds_for_every_loss_type() -> None:
    with pytest.raises(ValueError, match="cu_seqlens is None, needs"):
        sgcd_loss(**batch() | {"cu_seqlens": None, "advantages": torch.randn(N)}, loss_type="dapo")
