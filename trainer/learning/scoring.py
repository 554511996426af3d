"""The statistics of every generated token under student and teacher, and the weights computed from them.

The teacher is the policy itself, reading the reference in its prompt; forward only. The student's hidden states come
from the training forward, which is needed anyway, so that scoring costs one teacher forward and two products with the
head. Divergences are exact over the full vocabulary and computed from hidden states, without materialised logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sgcd_kernels import CreditConfig, OutputHead, PolicyLossConfig, linear_divergence, linear_logprob
from sgcd_kernels.core.lm_head import LMHead
from sgcd_kernels.credit.rules import never_acts
from sgcd_kernels.ops import sgcd
from sgcd_kernels.ops.policy_inputs import PolicyTokens, Settings
from sgcd_kernels.ops.sgcd_batch import CreditInputs, Teacher
from trainer.data import Group, Rollout, Scored
from trainer.learning.packing import LossTokens, forward
from trainer.protocols import Renderer, Suite
from trainer.references.teacher_context import literal_mask, teacher_prompt
from trainer.stage_clock import Clock

IGNORE_INDEX = -100  # no token of ours is ignored
AS_MEASURED = ("student_logp", "teacher_logp", "student_entropy", "teacher_entropy")  # fields of DivergenceStats
AT_OBSERVATIONS = {"weights": 1.0, "span_ids": -1}  # values at observed tokens; other fields are 0


@dataclass(frozen=True)
class Sample:
    """One rollout with its advantage and its teacher's prompt."""

    rollout: Rollout
    advantage: float
    teacher_prompt: list[int] | None  # None: no reference, no teacher, W = 1
    masked_literals: list[bool]  # tokens that spell an answer: W = 1

    def generated_literals(self) -> list[bool]:
        """Per generated token, whether it spells an answer."""
        generated = self.rollout.generated
        return [masked for masked, own in zip(self.masked_literals or [False] * len(generated), generated) if own]


def prepare_samples(
    groups: Sequence[Group], advantages: Sequence[float], suite: Suite, renderer: Renderer
) -> list[Sample]:
    """Give every rollout of `groups` its teacher's prompt. Groups without a reference get no teacher."""
    samples: list[Sample] = []
    for group in groups:
        literals = [*suite.answer_literals(group.task), *group.reference_info.get("literals", [])]
        for rollout in group.rollouts:
            advantage = advantages[len(samples)]
            if group.reference:
                prompt = teacher_prompt(renderer, rollout, group.reference)
                samples.append(Sample(rollout, advantage, prompt, literal_mask(renderer, rollout, literals)))
            else:
                samples.append(Sample(rollout, advantage, None, []))
    return samples


@dataclass(frozen=True)
class MicroBatch:
    """Some rollouts of a step, with the hidden states of student and teacher."""

    samples: list[Sample]
    tokens: LossTokens
    student: Tensor  # [N, H], with its graph
    teacher: Tensor | None  # [N, H], where `has_teacher`; None if no rollout has a reference that is needed
    has_teacher: Tensor  # [N] bool

    def advantages(self) -> Tensor:  # [B]
        return torch.tensor([sample.advantage for sample in self.samples], device=self.student.device)

    def unpack(self, values: sgcd.SGCDTokens) -> list[Scored]:
        """Per rollout, aligned with its ids."""
        columns = {name: self.tokens.unpack(x, AT_OBSERVATIONS.get(name, 0.0)) for name, x in values._asdict().items()}
        return [
            Scored(sample.rollout, **{name: rows[i] for name, rows in columns.items()})
            for i, sample in enumerate(self.samples)
        ]


@dataclass(frozen=True)
class Scorer:
    """Runs micro-batches through the current weights of `model`, and compares student and teacher.

    `always` runs the teacher also where the credit rule cannot act: for a loss that distils it.
    """

    model: Any
    head: OutputHead
    pad_id: int
    temperature: float
    config: CreditConfig
    clock: Clock = field(default_factory=Clock)
    always: bool = False

    def forward(self, samples: Sequence[Sample]) -> MicroBatch:
        """The training forward of the student, and a forward of the teacher without a graph."""
        rollouts = [sample.rollout for sample in samples]
        student = forward(self.model, [r.prompt_ids for r in rollouts], rollouts, self.pad_id)
        tokens = LossTokens.of(rollouts, student.device)
        has_teacher = tokens.spread(torch.tensor([sample.teacher_prompt is not None for sample in samples]))
        with self.clock("score"):
            teacher = self._teacher(samples, student, has_teacher)
        return MicroBatch(list(samples), tokens, student, teacher, has_teacher)

    @torch.no_grad()
    def _teacher(self, samples: Sequence[Sample], student: Tensor, has_teacher: Tensor) -> Tensor | None:
        taught = [(s.teacher_prompt, s.rollout) for s in samples if s.teacher_prompt is not None]
        if not taught or (never_acts(self.config) and not self.always):
            return None
        states = forward(self.model, [prompt for prompt, _ in taught], [rollout for _, rollout in taught], self.pad_id)
        rows = torch.zeros(student.shape, dtype=states.dtype, device=states.device)
        rows[has_teacher] = states
        return rows

    def settings(self, policy: PolicyLossConfig | None = None) -> Settings:
        """The head, with the temperature that applies once, the same to student and teacher."""
        lm_head = LMHead(self.head.weight, **self.head.options(self.temperature))
        return Settings(lm_head, policy or PolicyLossConfig(loss_type="dapo"), IGNORE_INDEX, "auto")

    def score(self, batch: MicroBatch, salt: int = 0) -> sgcd.Scored | None:
        """Divergences and credit; None where no token has a teacher or the credit rule cannot act.

        `salt` varies the permutation of rule "permuted" between micro-batches.
        """
        tokens, settings = batch.tokens, self.settings()
        masked = [m for s in batch.samples for m in s.generated_literals()]
        inputs = CreditInputs(
            Teacher(batch.teacher, settings.head, batch.has_teacher),
            credit_mask=~torch.tensor(masked, dtype=torch.bool, device=batch.student.device),
            turn_ids=tokens.turns,
            config=replace(self.config, seed=self.config.seed + salt),
            warn=False,  # one micro-batch may have no spikes; the step is checked as a whole
        )
        given = PolicyTokens(tokens.targets, batch.advantages(), cu_seqlens=tokens.cu_seqlens)
        with self.clock("score"):
            return sgcd.score_and_weigh(batch.student, settings, given, inputs)

    @torch.no_grad()
    def without_loss(self, batch: MicroBatch, scored: sgcd.Scored | None) -> sgcd.SGCDTokens:
        """The statistics of every token if no policy loss computes those of tokens without a teacher."""
        targets, has_teacher, head = batch.tokens.targets, batch.has_teacher, self.settings().head
        if batch.teacher is not None:
            targets = targets.masked_fill(has_teacher, IGNORE_INDEX)
        transform = self.head.options(self.temperature)
        alone = linear_logprob(batch.student, head.weight, targets, **transform)
        if scored is not None:
            return scored.tokens(alone.logp, alone.entropy)
        tokens = sgcd.unscored_tokens(alone.logp, alone.entropy)
        if batch.teacher is None:
            return tokens
        # A loss that distils has a teacher also where the credit rule cannot act.
        targets = batch.tokens.targets.masked_fill(~has_teacher, IGNORE_INDEX)
        stats = linear_divergence(batch.student, head.weight, targets, batch.teacher, **transform)
        compared = {name: getattr(stats, name) for name in AS_MEASURED} | {"divergence": stats.reverse_kl}
        own = tokens._asdict()
        return tokens._replace(**{name: torch.where(has_teacher, x, own[name]) for name, x in compared.items()})
