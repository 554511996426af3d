"""Scoring: the invariants of the method, on rollouts of a real (tiny) policy."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from sgcd_kernels import CreditConfig, output_head
from tests.trainer import toy
from trainer.config import EnvConfig
from trainer.data import Group, Sampling, Scored
from trainer.engines.hf import HFEngine
from trainer.learning.model import hidden_states
from trainer.learning.packing import forward, microbatches
from trainer.learning.scoring import Sample, Scorer, prepare_samples
from trainer.learning.update import group_advantages
from trainer.references.teacher_context import teacher_prompt
from trainer.rollout.episode import RolloutSetup
from trainer.rollout.siblings import run_group

RENDERER = toy.renderer()
REFERENCE = "say w7 even w3 at poke"
SHARP = CreditConfig(d_floor=1e-3)


def groups(model: Any, n: int = 4, tasks: int = 2) -> list[Group]:
    suite = toy.ParitySuite()
    engine = HFEngine(model, slots=16, stop_ids=RENDERER.stop_ids, max_length=200)

    async def sample() -> list[Group]:
        settings, sampling = EnvConfig(max_turns=4), Sampling(max_tokens=20)
        setup = RolloutSetup(engine, suite, RENDERER, sampling, settings, 200)
        return [await run_group(setup, task, n) for task in suite.tasks("train")[:tasks]]

    return asyncio.run(sample())


def score(model: Any, made: list[Group], config: CreditConfig = SHARP, temperature: float = 1.0) -> list[Scored]:
    samples = prepare_samples(made, group_advantages(made, scale=True), toy.ParitySuite(), RENDERER)
    return score_samples(Scorer(model, output_head(model), RENDERER.pad_id, temperature, config), samples)


def score_samples(scorer: Scorer, samples: list[Sample]) -> list[Scored]:
    batch = scorer.forward(samples)
    return batch.unpack(scorer.without_loss(batch, scorer.score(batch)))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Any:
    return toy.model(request.param)


@pytest.fixture
def made(model: Any) -> list[Group]:
    return groups(model)


def own(s: Scored) -> torch.Tensor:
    return torch.tensor(s.rollout.generated)


def test_scores_are_those_of_a_naive_pass_one_rollout_at_a_time(model: Any, made: list[Group]) -> None:
    made[0].reference = made[1].reference = REFERENCE
    head = output_head(model)
    temperature = 0.7
    for s in score(model, made, temperature=temperature):
        prompts = [s.rollout.prompt_ids, RENDERER.prompt(s.rollout.prompt_messages, s.rollout.tools, REFERENCE)]
        with torch.no_grad():
            p, q = (
                (
                    head.logits(hidden_states(model, torch.tensor([prompt + s.rollout.ids]))[0]) / temperature
                ).log_softmax(-1)[len(prompt) - 1 : -1]
                for prompt in prompts
            )
        at = own(s)
        ids = torch.tensor(s.rollout.ids)[:, None]
        close = {"atol": 2e-5, "rtol": 1e-4}
        torch.testing.assert_close(s.divergence[at], (p.exp() * (p - q)).sum(-1)[at], **close)
        torch.testing.assert_close(s.student_logp[at], p.gather(1, ids)[:, 0][at], **close)
        torch.testing.assert_close(s.teacher_logp[at], q.gather(1, ids)[:, 0][at], **close)
        torch.testing.assert_close(s.student_entropy[at], -(p.exp() * p).sum(-1)[at], **close)
        torch.testing.assert_close(s.teacher_entropy[at], -(q.exp() * q).sum(-1)[at], **close)
        assert bool((s.divergence[at] > 0).any())


def test_a_distillation_measures_its_teacher_also_where_credit_cannot_act(model: Any, made: list[Group]) -> None:
    """Else every divergence would be 0, and the run be reported as invalid."""
    made[0].reference = REFERENCE  # the other group has no teacher
    samples = prepare_samples(made, group_advantages(made, scale=True), toy.ParitySuite(), RENDERER)
    off = Scorer(model, output_head(model), RENDERER.pad_id, 0.7, CreditConfig(gamma=0.0), always=True)
    for got, expected in zip(score_samples(off, samples), score(model, made, temperature=0.7), strict=True):
        for name in ("student_logp", "teacher_logp", "student_entropy", "teacher_entropy", "divergence"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
        assert bool((got.weights == 1).all()) and bool((got.saliency == 0).all()) and bool((got.span_ids == -1).all())


def test_observed_tokens_have_no_scores(model: Any, made: list[Group]) -> None:
    made[0].reference = made[1].reference = REFERENCE
    scored = score(model, made)
    assert any(not all(s.rollout.generated) for s in scored)
    for s in scored:
        seen = ~own(s)
        assert s.divergence.shape == s.weights.shape == (len(s.rollout.ids),)
        assert set(s.divergence[seen].tolist()) <= {0.0}
        assert set(s.weights[seen].tolist()) <= {1.0}
        assert set(s.span_ids[seen].tolist()) <= {-1}


def test_weights_stay_in_bounds_and_carry_no_gradient(model: Any, made: list[Group]) -> None:
    made[0].reference = made[1].reference = REFERENCE
    scored = score(model, made)
    weights = torch.cat([s.weights for s in scored])
    assert weights.min() == 1
    assert 1 < weights.max() <= 2
    for s in scored:
        assert not any(getattr(s, name).requires_grad for name in ("divergence", "weights", "saliency", "student_logp"))


def test_without_a_reference_everything_is_blank(model: Any, made: list[Group]) -> None:
    made[0].reference = REFERENCE
    scored = score(model, made)
    taught, alone = scored[: len(made[0].rollouts)], scored[len(made[0].rollouts) :]
    assert any(bool((s.divergence > 0).any()) for s in taught)
    for s in alone:
        assert torch.equal(s.divergence, torch.zeros_like(s.divergence))
        assert torch.equal(s.weights, torch.ones_like(s.weights))
        assert torch.equal(s.student_logp, s.teacher_logp)
        assert bool((s.student_logp[own(s)] < 0).any())


def test_an_empty_reference_is_the_student_itself(made: list[Group]) -> None:
    rollout = made[0].rollouts[0]
    assert teacher_prompt(RENDERER, rollout, "") == rollout.prompt_ids


def test_identical_prompts_would_diverge_by_exactly_nothing(model: Any, made: list[Group]) -> None:
    """The shortcut for empty references changes no value: the long way gives exact zeros as well."""
    made[0].reference = REFERENCE
    samples = prepare_samples(made[:1], group_advantages(made[:1], True), toy.ParitySuite(), RENDERER)
    samples = [replace(p, teacher_prompt=p.rollout.prompt_ids) for p in samples]
    scored = score_samples(Scorer(model, output_head(model), RENDERER.pad_id, 1.0, SHARP), samples)
    assert all(bool((s.divergence == 0).all() and (s.weights == 1).all()) for s in scored)


def test_the_reference_never_reaches_the_student(made: list[Group]) -> None:
    made[0].reference = REFERENCE
    samples = prepare_samples(made, group_advantages(made, True), toy.ParitySuite(), RENDERER)
    marker = RENDERER.vocabulary["<ref>"]
    for sample in samples:
        assert marker not in sample.rollout.prompt_ids
        if sample.teacher_prompt is not None:
            assert marker in sample.teacher_prompt
            assert sample.teacher_prompt[-len(sample.rollout.prompt_ids) :] == sample.rollout.prompt_ids


def test_tokens_that_spell_an_answer_keep_weight_one(model: Any, made: list[Group]) -> None:
    made[0].reference = made[1].reference = REFERENCE
    answer = RENDERER.vocabulary["w7"]  # what ParitySuite calls an answer literal
    spelt = torch.cat([s.weights[torch.tensor(s.rollout.ids) == answer] for s in score(model, made)])
    assert len(spelt) > 0
    assert bool((spelt == 1).all())
    made[0].reference_info["literals"] = ["w6"]
    also = RENDERER.vocabulary["w6"]
    first = score(model, made)[: len(made[0].rollouts)]
    assert all(bool((s.weights[torch.tensor(s.rollout.ids) == also] == 1).all()) for s in first)


def test_spans_end_with_their_turn(model: Any, made: list[Group]) -> None:
    """With a patience that never runs out, only the end of a turn ends a span."""
    made[0].reference = made[1].reference = REFERENCE
    endless = replace(SHARP, start=1e-6, reset=0.0, entropy_margin=100.0)
    scored = score(model, made, endless)
    assert any(len(set(s.rollout.turns)) > 1 for s in scored)
    for s in scored:
        for span in set(s.span_ids.tolist()) - {-1}:
            assert len({s.rollout.turns[i] for i in (s.span_ids == span).nonzero()[:, 0].tolist()}) == 1


@pytest.mark.parametrize(
    "rule", ["gear", "rlsd", "sc_grpo", "egrsd", "dgpo", "turn_level", "uniform", "matched_uniform", "permuted"]
)
def test_every_rule_gets_what_it_needs(model: Any, made: list[Group], rule: Any) -> None:
    made[0].reference = made[1].reference = REFERENCE
    weights = torch.cat([s.weights[own(s)] for s in score(model, made, replace(SHARP, rule=rule))])
    assert bool((weights != 1).any())


def test_batching_changes_nothing(model: Any, made: list[Group]) -> None:
    """Padding and neighbours are invisible to a token."""
    rollouts = [r for g in made for r in g.rollouts]
    together = forward(model, [r.prompt_ids for r in rollouts], rollouts, RENDERER.pad_id).detach()
    alone = torch.cat([forward(model, [r.prompt_ids], [r], RENDERER.pad_id).detach() for r in rollouts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_microbatches_keep_the_budget_and_lose_no_rollout(made: list[Group]) -> None:
    rollouts = [r for g in made for r in g.rollouts]
    sizes = [len(r.prompt_ids) + len(r.ids) for r in rollouts]
    batches = microbatches(rollouts, 2 * max(sizes))
    assert sorted(i for b in batches for i in b) == list(range(len(rollouts)))
    assert all(len(b) * max(sizes[i] for i in b) <= 2 * max(sizes) for b in batches)
    assert len(batches) > 1
    assert microbatches(rollouts, 1) == [[i] for i in sorted(range(len(rollouts)), key=lambda i: sizes[i])]
