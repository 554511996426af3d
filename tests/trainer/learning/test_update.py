"""The optimiser step: arms that differ in their credit alone, and steps that are invalid and say so."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgcd_kernels import CreditConfig, output_head
from tests.trainer import toy
from tests.trainer.learning.test_scoring import REFERENCE, groups
from trainer.config import Config, EngineConfig, ModelConfig
from trainer.data import Group, Rollout, Scored
from trainer.learning import scoring
from trainer.learning.model import hidden_states
from trainer.learning.packing import forward
from trainer.learning.update import Learner, group_advantages, mismatch
from trainer.stage_clock import Clock

RENDERER = toy.renderer()
SHARP = CreditConfig(d_floor=1e-3)


@pytest.fixture(scope="module")
def model() -> Any:
    return toy.model("qwen3")


@pytest.fixture(scope="module")
def sampled(model: Any) -> list[Group]:
    made = groups(model, n=4, tasks=3)
    assert any(g.mixed for g in made)
    return made


def learner(model: Any, **fields: Any) -> Learner:
    config = Config(**{"arm": "sgcd", "credit": SHARP, "model": ModelConfig(max_length=200), **fields})
    return Learner.of(config, copy.deepcopy(model), RENDERER, toy.ParitySuite())


def referenced(made: list[Group]) -> list[Group]:
    return [Group(g.task, g.rollouts, REFERENCE) for g in made]


def stepped(model: Any, made: list[Group], **fields: Any) -> tuple[dict[str, float], list[list[Scored]], Any]:
    learning = learner(model, **fields)
    metrics, scored = learning.update(made, 1, Clock())
    return metrics, scored, learning.model


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def naive_loss(model: Any, made: list[Group], weights: list[torch.Tensor], loss_type: str) -> torch.Tensor:
    """-A W log p at temperature 0.8, one rollout at a time, from logits."""
    head = output_head(model)
    terms = []
    rollouts = [r for g in made for r in g.rollouts]
    for rollout, advantage, w in zip(rollouts, group_advantages(made, True), weights):
        ids = torch.tensor([rollout.prompt_ids + rollout.ids])
        logp = (head.logits(hidden_states(model, ids)[0]) / 0.8).log_softmax(-1)
        logp = logp[len(rollout.prompt_ids) - 1 : -1].gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
        own = torch.tensor(rollout.generated)
        terms.append((-advantage * w * logp)[own])
    if loss_type == "grpo":
        return torch.stack([t.mean() for t in terms]).mean()
    count = len(terms) * 200 if loss_type == "dr_grpo" else sum(len(t) for t in terms)
    return torch.cat(terms).sum() / count


def at_temperature(model: Any, made: list[Group], temperature: float) -> list[Group]:
    """The same groups as if they had been sampled at `temperature`."""
    made = copy.deepcopy(made)
    _, scored, _ = stepped(model, made, arm="grpo", temperature=temperature)
    for s in (s for row in scored for s in row):
        s.rollout.logprobs = s.student_logp.tolist()
    return made


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("budget", [10_000, 150])
def test_gradient_is_that_of_the_naive_weighted_loss(
    model: Any, sampled: list[Group], loss_type: Any, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the micro-batches: the whole batch's denominator, and W on every generated token."""
    learning = learner(model, loss_type=loss_type, tokens_per_microbatch=budget, temperature=0.8)
    monkeypatch.setattr(Learner, "_apply", lambda self, rate: 0.0)
    made = at_temperature(model, sampled, 0.8)
    _, scored = learning.update(referenced(made), 1, Clock())
    weights = [s.weights for row in scored for s in row]
    assert any(bool((w > 1).any()) for w in weights)
    other = copy.deepcopy(model)
    naive_loss(other, sampled, weights, loss_type).backward()
    for ours, theirs in zip(learning.model.parameters(), other.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-3)


def test_without_credit_sgcd_is_grpo_bit_by_bit(model: Any, sampled: list[Group]) -> None:
    base, _, grpo = stepped(model, sampled, arm="grpo")
    variants = {
        "gamma 0": (referenced(sampled), {"credit": CreditConfig(d_floor=1e-3, gamma=0.0)}),
        "rule none": (referenced(sampled), {"credit": CreditConfig(rule="none")}),
        "no reference": (sampled, {}),
    }
    for name, (made, fields) in variants.items():
        metrics, _, other = stepped(model, made, **fields)
        assert same(grpo, other), name
        assert metrics["loss"] == base["loss"]
        assert metrics["grad_norm"] == base["grad_norm"]


def test_the_ratio_to_the_policy_that_sampled_is_clipped(model: Any, sampled: list[Group]) -> None:
    """A token that has become far likelier than when it was sampled has no gradient where A > 0, and is counted."""
    on_policy, _, _ = stepped(model, sampled, arm="grpo", tokens_per_microbatch=150)
    assert on_policy["clip_ratio/region_mean"] == 0
    made, shifted = copy.deepcopy(sampled), 0
    for rollout, advantage in zip([r for g in made for r in g.rollouts], group_advantages(made, True)):
        if advantage > 0:
            rollout.logprobs = [p - 1.0 for p in rollout.logprobs]
            shifted += sum(rollout.generated)
    assert shifted > 0
    metrics, _, clipped = stepped(model, made, arm="grpo", tokens_per_microbatch=150)
    tokens = sum(sum(r.generated) for g in made for r in g.rollouts)
    assert metrics["clip_ratio/high_mean"] == metrics["clip_ratio/region_mean"] == pytest.approx(shifted / tokens)
    _, _, free = stepped(model, made, arm="grpo", tokens_per_microbatch=150, epsilon_high=10.0)
    assert not same(clipped, free)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(model: Any, sampled: list[Group], bad: float) -> None:
    learning = learner(model, arm="grpo", weight_decay=0.1)
    weight = learning.head.weight
    hook = weight.register_hook(lambda grad: grad * bad)
    assert learning.update(sampled, 1, Clock())[0]["update/skipped"] == 1
    assert same(learning.model, model)
    hook.remove()
    assert learning.update(sampled, 2, Clock())[0]["update/skipped"] == 0
    assert not same(learning.model, model)


def test_credit_changes_the_step(model: Any, sampled: list[Group]) -> None:
    _, _, grpo = stepped(model, sampled, arm="grpo")
    _, scored, sgcd = stepped(model, referenced(sampled))
    assert not same(grpo, sgcd)
    assert any(bool((s.weights > 1).any()) for row in scored for s in row)


def test_direct_sd_replaces_the_policy_loss(model: Any, sampled: list[Group]) -> None:
    """It moves the student towards its teacher, whatever the rewards say."""
    metrics, before, moved = stepped(model, referenced(sampled), arm="direct_sd", learning_rate=1e-2)
    flipped = [Group(g.task, [copy.copy(r) for r in g.rollouts], REFERENCE) for g in sampled]
    for rollout in (r for g in flipped for r in g.rollouts):
        rollout.reward = 1 - rollout.reward
    _, _, again = stepped(model, flipped, arm="direct_sd", learning_rate=1e-2)
    assert same(moved, again)
    own = [torch.tensor(s.rollout.generated) for row in before for s in row]
    divergence = torch.cat([s.divergence[at] for at, s in zip(own, (s for row in before for s in row))])
    assert metrics["loss"] == pytest.approx(divergence.mean().item(), rel=1e-4)
    _, _, untouched = stepped(model, sampled, arm="direct_sd", weight_decay=0.0)
    assert same(untouched, model)


def test_engine_and_trainer_agree_on_what_was_sampled(model: Any, sampled: list[Group]) -> None:
    metrics, scored, _ = stepped(model, sampled, arm="grpo")
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    scored[0][0].rollout.logprobs[0] -= 1.0
    try:
        found = mismatch([s for row in scored for s in row])
        assert found["sampling/sampling_logp_difference/max"] == pytest.approx(1, abs=1e-3)
        assert found["sampling/importance_sampling_ratio/max"] == pytest.approx(math.e, rel=1e-3)
    finally:
        scored[0][0].rollout.logprobs[0] += 1.0


def test_scores_come_back_in_the_order_of_the_rollouts(model: Any, sampled: list[Group]) -> None:
    _, scored, _ = stepped(model, referenced(sampled), tokens_per_microbatch=100)
    assert [[s.rollout for s in row] for row in scored] == [g.rollouts for g in sampled]


def test_learning_rate_warms_up(model: Any, sampled: list[Group]) -> None:
    learning = learner(model, learning_rate=4e-3, lr_warmup_steps=4)
    rates = [learning.update(sampled, step, Clock())[0]["learning_rate"] for step in (1, 2, 4, 5)]
    assert rates == [1e-3, 2e-3, 4e-3, 4e-3]


def test_advantages() -> None:
    task = toy.ParitySuite().tasks("train")[0]
    made = [Group(task, [Rollout(task, [], [], [], reward=r) for r in rewards]) for rewards in ((0.0, 1.0), (1.0, 1.0))]
    assert group_advantages(made, scale=False) == [-0.5, 0.5, 0.0, 0.0]
    scaled = group_advantages(made, scale=True)
    assert scaled == pytest.approx([-(0.5**0.5), 0.5**0.5, 0, 0], abs=1e-3)


class Largest(TorchDispatchMode):
    """Remembers the most elements any operator gave back."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("arm", ["sgcd", "direct_sd"])
def test_no_matrix_of_tokens_by_vocabulary_exists(sampled: list[Group], arm: Any) -> None:
    """The largest tensor of a whole step stays at the library's workspace budget, far below N * V."""
    vocabulary, copies = 40_000, 8
    made = [g for g in referenced(sampled) for _ in range(copies)]
    loss_tokens = sum(sum(r.generated) for g in made for r in g.rollouts)
    budget = 64 * 2**20 // 4
    assert loss_tokens * vocabulary > 1.5 * budget
    learning = learner(toy.model(vocab_size=vocabulary), arm=arm, tokens_per_microbatch=10**6)
    with Largest() as seen:
        learning.update(made, 1, Clock())
    assert vocabulary * 64 <= seen.elements <= budget


def test_a_mask_over_observations_stops_the_step(model: Any, sampled: list[Group]) -> None:
    made = copy.deepcopy(sampled)
    rollout = next(r for g in made for r in g.rollouts if not all(r.generated))
    rollout.generated[rollout.generated.index(False)] = True
    with pytest.raises(RuntimeError, match="loss mask covers"):
        learner(model).update(made, 1, Clock())


def test_differences_of_engine_and_trainer_are_corrected_up_to_a_cap(model: Any, sampled: list[Group]) -> None:
    """An engine that says e^-0.3 of the trainer's probability: every term counts e^0.3; e^-2 is cut at clip_max."""

    def loss(shift: float, **fields: Any) -> float:
        shifted = [Group(g.task, [copy.copy(r) for r in g.rollouts]) for g in sampled]
        for rollout in (r for g in shifted for r in g.rollouts):
            rollout.logprobs = [p - shift * own for p, own in zip(rollout.logprobs, rollout.generated)]
        metrics, _, _ = stepped(model, shifted, arm="grpo", loss_type="grpo", scale_rewards=False, **fields)
        return metrics["grad_norm"]

    served = {"engine": EngineConfig(name="vllm", urls=["http://localhost:1"]), "max_grad_norm": 1e9}
    exact = loss(0.0, **served)
    assert exact == pytest.approx(loss(0.0, max_grad_norm=1e9), rel=1e-3)
    assert loss(0.3, **served) == pytest.approx(exact * math.exp(0.3), rel=1e-3)
    assert loss(2.0, **served) == pytest.approx(exact * 2.0, rel=1e-3)
    assert loss(2.0, vllm_importance_sampling_clip_max=3.0, **served) == pytest.approx(exact * 3.0, rel=1e-3)
    uncorrected = loss(2.0, vllm_importance_sampling_correction=False, **served)
    assert uncorrected == pytest.approx(loss(2.0, max_grad_norm=1e9), rel=1e-6), "then vllm is treated as hf is"


def test_the_training_forward_is_not_charged_to_credit(
    model: Any, sampled: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`time/sgcd_overhead` is the teacher's forward and scoring, not the forward that any arm needs."""
    clock, charged = Clock(), list[tuple[str, bool]]()

    def observed(*args: Any) -> torch.Tensor:
        charged.append((clock._stack[-1], torch.is_grad_enabled()))
        return forward(*args)

    monkeypatch.setattr(scoring, "forward", observed)
    learner(model).update(referenced(sampled), 1, clock)
    assert set(charged) == {("update", True), ("score", False)}
