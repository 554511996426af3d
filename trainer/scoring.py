"""The privileged teacher's opinion of every generated token, and the weights that follow from it.

The teacher is the policy itself, reading the reference in its prompt; forward only. The student's hidden states come
from the training forward, which is made in any case, so that scoring costs one teacher forward and two products with
the head. Divergences are exact over the whole vocabulary and come straight from hidden states: no logits exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sgcd_kernels import CreditConfig, DivergenceStats, LogprobStats, credit_weights, linear_divergence, linear_logprob
from trainer.clock import Clock
from trainer.credit.context import literal_mask, teacher_prompt
from trainer.metrics import Scored
from trainer.model import head
from trainer.packing import LossTokens, forward
from trainer.types import Group, Renderer, Rollout, Suite

BLANK = {"divergence": 0.0, "weights": 1.0, "saliency": 0.0, "span_ids": -1}  # at tokens without an opinion


@dataclass(frozen=True)
class Pupil:
    """A rollout as scoring sees it."""

    rollout: Rollout
    advantage: float
    teacher_prompt: list[int] | None  # None: no reference, no opinion, W = 1
    shielded: list[bool]  # tokens that spell an answer: W = 1


@dataclass(frozen=True)
class Scores:
    """One micro-batch, scored: [N] a field, in the order of `LossTokens`."""

    weights: Tensor
    student_logp: Tensor
    teacher_hidden: Tensor | None  # [n, H], of the tokens `opined` only
    opined: Tensor  # [N] bool: the token's rollout has a reference
    scored: list[Scored]


def prepare(groups: Sequence[Group], advantages: Sequence[float], suite: Suite, renderer: Renderer) -> list[Pupil]:
    """Every rollout of `groups` with what its teacher reads. Groups without a reference get no teacher."""
    pupils: list[Pupil] = []
    for group in groups:
        literals = [*suite.answer_literals(group.task), *group.reference_info.get("literals", [])]
        for rollout in group.rollouts:
            advantage = advantages[len(pupils)]
            if group.reference:
                prompt = teacher_prompt(renderer, rollout, group.reference)
                pupils.append(Pupil(rollout, advantage, prompt, literal_mask(renderer, rollout, literals)))
            else:
                pupils.append(Pupil(rollout, advantage, None, []))
    return pupils


@dataclass(frozen=True)
class Scorer:
    """Scores micro-batches with the current weights of `model`."""

    model: Any
    pad_id: int
    temperature: float
    config: CreditConfig
    clock: Clock

    @torch.no_grad()
    def score(self, pupils: Sequence[Pupil], tokens: LossTokens, student: Tensor, salt: int = 0) -> Scores:
        """Divergences, entropies and weights of the micro-batch `pupils`, whose student hidden states are [N, H].

        Temperature is applied once, here, the same to student and teacher. `salt` varies the permutation of rule
        "permuted" between micro-batches.
        """
        student = student.detach()
        opined = tokens.spread(torch.tensor([p.teacher_prompt is not None for p in pupils]))
        with self.clock("score"):
            teacher = self._teacher(pupils)
            fields = self._compare(student, teacher, tokens.targets, opined)
        with self.clock("credit"):
            fields.update(self._credit(pupils, tokens, fields, opined, salt))
            columns = {name: tokens.unpack(fields[name], BLANK.get(name, 0.0)) for name in _COLUMNS}
            scored = [
                Scored(p.rollout, **{name: rows[i] for name, rows in columns.items()}) for i, p in enumerate(pupils)
            ]
        return Scores(fields["weights"], fields["student_logp"], teacher, opined, scored)

    def _teacher(self, pupils: Sequence[Pupil]) -> Tensor | None:  # [n, H]
        taught = [(p.teacher_prompt, p.rollout) for p in pupils if p.teacher_prompt is not None]
        if not taught:
            return None
        return forward(self.model, [prompt for prompt, _ in taught], [rollout for _, rollout in taught], self.pad_id)

    def _compare(self, student: Tensor, teacher: Tensor | None, targets: Tensor, opined: Tensor) -> dict[str, Tensor]:
        """The statistics of every token; without a teacher the student is its own, and every divergence is 0."""
        weight, bias = head(self.model)
        alone: LogprobStats | None = None
        both: DivergenceStats | None = None
        if not bool(opined.all()):
            mine = targets.masked_fill(opined, -100)
            alone = linear_logprob(student, weight, mine, bias=bias, temperature=self.temperature)
        if teacher is not None:
            both = linear_divergence(
                student[opined], weight, targets[opined], teacher, bias=bias, temperature=self.temperature
            )
        fields = {}
        for name, (with_teacher, without) in _SOURCES.items():
            blank = torch.full(targets.shape, 1.0 if name == "bhattacharyya" else 0.0, device=targets.device)
            values = blank if alone is None or without is None else getattr(alone, without)
            if both is not None:
                values = values.masked_scatter(opined, getattr(both, with_teacher).to(values.dtype))
            fields[name] = values
        return fields

    def _credit(
        self, pupils: Sequence[Pupil], tokens: LossTokens, fields: dict[str, Tensor], opined: Tensor, salt: int
    ) -> dict[str, Tensor]:
        """Weights, saliency and span ids; 1, 0 and -1 where there is no teacher or an answer is spelt."""
        shape, device = tokens.targets.shape, tokens.targets.device
        out = {
            "weights": torch.ones(shape, device=device),
            "saliency": torch.zeros(shape, device=device),
            "span_ids": torch.full(shape, -1, dtype=torch.long, device=device),
        }
        taught = [i for i, p in enumerate(pupils) if p.teacher_prompt is not None]
        if not taught:
            return out
        lengths = tokens.cu_seqlens.diff()[taught]
        shielded = [s for i in taught for s, own in zip(pupils[i].shielded, pupils[i].rollout.generated) if own]
        credit = credit_weights(
            fields["divergence"][opined],
            fields["teacher_entropy"][opined],
            torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            mask=~torch.tensor(shielded, dtype=torch.bool, device=device),
            turn_ids=tokens.turns[opined],
            advantages=torch.tensor([pupils[i].advantage for i in taught], device=device),
            log_ratio=(fields["teacher_logp"] - fields["student_logp"])[opined],
            forward_kl=fields["forward_kl"][opined],
            bhattacharyya=fields["bhattacharyya"][opined],
            student_entropy=fields["student_entropy"][opined],
            config=replace(self.config, seed=self.config.seed + salt),
        )
        for name, values in out.items():
            values[opined] = getattr(credit, name).to(values.dtype)
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
