"""The statistics of every generated token under student and teacher, and the weights that follow from them.

The teacher is the policy itself, reading the reference in its prompt; forward only. The student's hidden states come
from the training forward, which runs in any case, so that scoring costs one teacher forward and two products with the
head. Divergences are exact over the whole vocabulary and computed from hidden states, without materialised logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sgcd_kernels import CreditConfig, DivergenceStats, LogprobStats, credit_weights, linear_divergence, linear_logprob
from trainer.data import Group, Rollout, Scored
from trainer.learning.model import head
from trainer.learning.packing import LossTokens, forward
from trainer.protocols import Renderer, Suite
from trainer.references.teacher_context import literal_mask, teacher_prompt
from trainer.stage_clock import Clock

BLANK = {"divergence": 0.0, "weights": 1.0, "saliency": 0.0, "span_ids": -1}  # at tokens without a teacher


@dataclass(frozen=True)
class Sample:
    """One rollout with its advantage and what its teacher reads."""

    rollout: Rollout
    advantage: float
    teacher_prompt: list[int] | None  # None: no reference, no teacher, W = 1
    masked_literals: list[bool]  # tokens that spell an answer: W = 1


@dataclass(frozen=True)
class Scores:
    """One scored micro-batch: each tensor has one value per token, in the order of `LossTokens`."""

    weights: Tensor
    student_logp: Tensor
    teacher_hidden: Tensor | None  # [n, H], of the tokens with `has_teacher` only
    has_teacher: Tensor  # [N] bool: the teacher of the token's rollout read a reference
    scored: list[Scored]


def prepare_samples(
    groups: Sequence[Group], advantages: Sequence[float], suite: Suite, renderer: Renderer
) -> list[Sample]:
    """Give every rollout of `groups` what its teacher reads. Groups without a reference get no teacher."""
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
class Scorer:
    """Scores micro-batches with the current weights of `model`."""

    model: Any
    pad_id: int
    temperature: float
    config: CreditConfig
    clock: Clock

    @torch.no_grad()
    def score(self, samples: Sequence[Sample], tokens: LossTokens, student: Tensor, salt: int = 0) -> Scores:
        """Divergences, entropies and weights of the micro-batch `samples`, whose student hidden states are [N, H].

        Temperature is applied once, here, the same to student and teacher. `salt` varies the permutation of rule
        "permuted" between micro-batches.
        """
        student = student.detach()
        has_teacher = tokens.spread(torch.tensor([p.teacher_prompt is not None for p in samples]))
        with self.clock("score"):
            teacher = self._teacher(samples)
            fields = self._compare(student, teacher, tokens.targets, has_teacher)
        with self.clock("credit"):
            fields.update(self._credit(samples, tokens, fields, has_teacher, salt))
            columns = {name: tokens.unpack(fields[name], BLANK.get(name, 0.0)) for name in _COLUMNS}
            scored = [
                Scored(p.rollout, **{name: rows[i] for name, rows in columns.items()}) for i, p in enumerate(samples)
            ]
        return Scores(fields["weights"], fields["student_logp"], teacher, has_teacher, scored)

    def _teacher(self, samples: Sequence[Sample]) -> Tensor | None:  # [n, H]
        with_teacher = [(p.teacher_prompt, p.rollout) for p in samples if p.teacher_prompt is not None]
        if not with_teacher:
            return None
        return forward(
            self.model, [prompt for prompt, _ in with_teacher], [rollout for _, rollout in with_teacher], self.pad_id
        )

    def _compare(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor, has_teacher: Tensor
    ) -> dict[str, Tensor]:
        """Compute the statistics of every token; without a teacher the student stands in for it: every d is 0."""
        weight, bias = head(self.model)
        alone: LogprobStats | None = None
        both: DivergenceStats | None = None
        if not bool(has_teacher.all()):
            without_teacher = targets.masked_fill(has_teacher, -100)
            alone = linear_logprob(student, weight, without_teacher, bias=bias, temperature=self.temperature)
        if teacher is not None:
            both = linear_divergence(
                student[has_teacher], weight, targets[has_teacher], teacher, bias=bias, temperature=self.temperature
            )
        fields = {}
        for name, (with_teacher, without) in _SOURCES.items():
            blank = torch.full(targets.shape, 1.0 if name == "bhattacharyya" else 0.0, device=targets.device)
            values = blank if alone is None or without is None else getattr(alone, without)
            if both is not None:
                values = values.masked_scatter(has_teacher, getattr(both, with_teacher).to(values.dtype))
            fields[name] = values
        return fields

    def _credit(
        self, samples: Sequence[Sample], tokens: LossTokens, fields: dict[str, Tensor], has_teacher: Tensor, salt: int
    ) -> dict[str, Tensor]:
        """Compute weights, saliency and span ids: 1, 0 and -1 where there is no teacher or a literal is masked."""
        shape, device = tokens.targets.shape, tokens.targets.device
        out = {
            "weights": torch.ones(shape, device=device),
            "saliency": torch.zeros(shape, device=device),
            "span_ids": torch.full(shape, -1, dtype=torch.long, device=device),
        }
        with_teacher = [i for i, p in enumerate(samples) if p.teacher_prompt is not None]
        if not with_teacher:
            return out
        lengths = tokens.cu_seqlens.diff()[with_teacher]
        masked = [
            s for i in with_teacher for s, own in zip(samples[i].masked_literals, samples[i].rollout.generated) if own
        ]
        credit = credit_weights(
            fields["divergence"][has_teacher],
            fields["teacher_entropy"][has_teacher],
            torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            mask=~torch.tensor(masked, dtype=torch.bool, device=device),
            turn_ids=tokens.turns[has_teacher],
            advantages=torch.tensor([samples[i].advantage for i in with_teacher], device=device),
            log_ratio=(fields["teacher_logp"] - fields["student_logp"])[has_teacher],
            forward_kl=fields["forward_kl"][has_teacher],
            bhattacharyya=fields["bhattacharyya"][has_teacher],
            student_entropy=fields["student_entropy"][has_teacher],
            config=replace(self.config, seed=self.config.seed + salt),
        )
        for name, values in out.items():
            values[has_teacher] = getattr(credit, name).to(values.dtype)
        return out


_COLUMNS = ("student_logp", "teacher_logp", "student_entropy", "teacher_entropy", *BLANK)
# field <- its name in DivergenceStats, and in LogprobStats for a student without a teacher
_SOURCES: dict[str, tuple[str, str | None]] = {
    "student_logp": ("student_logp", "logp"),
    "teacher_logp": ("teacher_logp", "logp"),
    "student_entropy": ("student_entropy", "entropy"),
    "teacher_entropy": ("teacher_entropy", "entropy"),
    "divergence": ("reverse_kl", None),
    "forward_kl": ("forward_kl", None),
    "bhattacharyya": ("bhattacharyya", None),
}
