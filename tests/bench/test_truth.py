"""The exact answers are exact, and the gate notices wrong ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench import providers, truth
from bench.cases import OPS, Case, modes_of

CASES = {op: Case(op, modes_of(op)[-1], "tiny", 128, "fp32") for op in OPS}


@pytest.fixture(autouse=True, scope="module")
def load_providers() -> None:
    providers.load()


def outputs(op: str, name: str) -> tuple[object, truth.Truth, dict[str, torch.Tensor]]:
    i, exact = truth.prepare(CASES[op])
    p = next(p for p in providers.providers_of(op) if p.name == name)
    return i, exact, providers.run_once(p, i, CASES[op].mode)


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("divergence", "credit")])
def test_gradients_of_the_truth_are_those_of_autograd_in_fp64(op: str) -> None:
    """The whole gradient by autograd through full logits, another way than the truth's formulas."""
    i, exact = truth.prepare(CASES[op])
    expected = exact.expected(op)
    x, w = i.hidden[i.rows].double().requires_grad_(), i.weight.double().requires_grad_()
    log_p = F.log_softmax(x @ w.T, -1)
    logp = log_p.gather(1, i.ids[i.rows][:, None])[:, 0]
    if op == "distill":
        log_q = F.log_softmax(i.teacher[i.rows].double() @ w.detach().T, -1)
        m = (log_p.exp() + log_q.exp()) / 2
        loss = ((log_p.exp() * (log_p - m.log())).sum() + (log_q.exp() * (log_q - m.log())).sum()) / 2 / i.kept
    elif op == "logprob":
        loss = (logp * i.upstream[i.rows]).sum()
    elif op == "cross_entropy":
        loss = -logp.mean()
    else:
        weights = exact.weights if op == "sgcd" else torch.ones_like(logp)
        loss = truth.policy_loss(logp, i.old_logp[i.rows].double(), i.token_advantages.double() * weights)
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and w.grad is not None
    d_hidden, d_weight = exact.gradients(expected)
    torch.testing.assert_close(d_hidden, x.grad[exact.tokens], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(d_weight, w.grad[exact.vocabulary], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("op", ["logprob", "cross_entropy", "distill", "policy_loss", "sgcd"])
@pytest.mark.parametrize("name", ["d_hidden", "d_weight"])
def test_a_gradient_that_is_a_little_off_is_wrong(op: str, name: str) -> None:
    i, exact, found = outputs(op, "eager")
    assert truth.judge(op, "fp32", i, exact, found).right  # type: ignore[arg-type]
    broken = {**found, name: found[name] * 1.01}
    verdict = truth.judge(op, "fp32", i, exact, broken)  # type: ignore[arg-type]
    assert not verdict.right and name in verdict.reason


def test_weights_that_are_left_out_are_noticed() -> None:
    """The policy loss's gradient without token weights is not the credit step's."""
    i, exact, found = outputs("policy_loss", "eager")
    assert float(exact.weights.max()) > 1.2, "the inputs give no credit"
    assert not truth.judge("sgcd", "fp32", i, exact, found).right  # type: ignore[arg-type]


def test_a_mask_that_is_ignored_is_noticed() -> None:
    i, exact, found = outputs("cross_entropy", "eager")
    logp = F.log_softmax(i.hidden @ i.weight.T, -1).gather(1, i.ids[:, None])  # type: ignore[attr-defined]
    verdict = truth.judge("cross_entropy", "fp32", i, exact, {**found, "loss": -logp.mean()})  # type: ignore[arg-type]
    assert not verdict.right


def test_a_result_of_another_shape_is_wrong_and_not_an_exception() -> None:
    i, exact, found = outputs("divergence", "eager")
    verdict = truth.judge("divergence", "fp32", i, exact, {**found, "reverse_kl": torch.zeros(3)})  # type: ignore[arg-type]
    assert "has shape [3]" in verdict.reason


def test_values_may_come_for_all_tokens_or_for_those_with_a_loss() -> None:
    i, exact, found = outputs("divergence", "eager")
    blank = torch.full(i.mask.shape, torch.nan)  # type: ignore[attr-defined]
    full = {name: blank.index_copy(0, i.rows, value) for name, value in found.items()}  # type: ignore[attr-defined]
    assert truth.judge("divergence", "fp32", i, exact, full).right  # type: ignore[arg-type]
