"""One optimiser step: advantages, and for each micro-batch a training forward, its credit, and its share of the loss.

The head is applied by `sgcd_kernels` to the hidden states of loss tokens only. Micro-batches are cut by the student's
length alone and divided by the whole batch's token count, so that every arm sums the same terms in the same order: with
W = 1 throughout, SGCD is GRPO bit by bit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgcd_kernels import linear_distill_loss, linear_policy_loss
from trainer.clock import Clock
from trainer.metrics import Scored
from trainer.model import head
from trainer.packing import LossTokens, forward, microbatches
from trainer.scoring import Pupil, Scorer, Scores, prepare
from trainer.types import Group, Renderer, Rollout, Suite

if TYPE_CHECKING:
    from trainer.config import Config

STD_EPSILON = 1e-4  # as in TRL


def group_advantages(groups: Sequence[Group], scale: bool) -> list[float]:
    """(r - mean) / (std + eps) within each group, rollout after rollout; without `scale` just r - mean."""
    out = []
    for group in groups:
        rewards = [r.reward for r in group.rollouts]
        mean, width = fmean(rewards), stdev(rewards) + STD_EPSILON if scale else 1.0
        out += [(reward - mean) / width for reward in rewards]
    return out


def check_mask(rollout: Rollout, stop_ids: Collection[int]) -> None:
    """Refuse a rollout whose loss mask covers what the policy did not say.

    A turn is generated tokens and then observed ones, and a stop token can only be the last that was generated: an
    observation that is taken for the policy's own words breaks one or the other.
    """
    lists = (rollout.ids, rollout.generated, rollout.logprobs, rollout.turns, rollout.classes)
    if len({len(x) for x in lists}) != 1:
        raise RuntimeError(f"rollout of {rollout.task.id}: its lists have lengths {[len(x) for x in lists]}")
    for i in range(1, len(rollout.ids)):
        if rollout.generated[i] and rollout.turns[i] == rollout.turns[i - 1]:
            if not rollout.generated[i - 1]:
                raise RuntimeError(
                    f"rollout of {rollout.task.id}: token {i} is generated in the midst of an observation"
                )
            if rollout.ids[i - 1] in stop_ids:
                raise RuntimeError(
                    f"rollout of {rollout.task.id}: the loss mask covers token {i}, after the turn's end"
                )


@dataclass(frozen=True)
class Learner:
    """The policy and its optimiser."""

    config: Config
    model: Any
    renderer: Renderer
    suite: Suite
    optimiser: torch.optim.Optimizer

    @staticmethod
    def of(config: Config, model: Any, renderer: Renderer, suite: Suite) -> Learner:
        betas = (config.adam_beta1, config.adam_beta2)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)
        return Learner(config, model, renderer, suite, optimiser)

    def update(self, groups: Sequence[Group], step: int, clock: Clock) -> tuple[dict[str, float], list[list[Scored]]]:
        """Take one step on `groups`; give metrics, and what scoring said of each rollout (nested as the groups are).

        Raises:
            RuntimeError: a loss mask covers observed tokens.
        """
        with clock("update"):
            for rollout in (r for g in groups for r in g.rollouts):
                check_mask(rollout, self.renderer.stop_ids)
        with clock("credit"):
            advantages = group_advantages(groups, self.config.scale_rewards)
            pupils = prepare(groups, advantages, self.suite, self.renderer)
        with clock("update"):
            losses, scored = self._accumulate(pupils, step, clock)
            rate = self.config.learning_rate * min(1.0, step / max(1, self.config.lr_warmup_steps))
            norm = self._apply(rate)
        metrics = {
            **losses,
            "grad_norm": norm,
            "update/skipped": float(not isfinite(norm)),
            "learning_rate": rate,
            "leak/masked_literal_hits": float(sum(sum(p.shielded) for p in pupils)),
            **mismatch(scored),
        }
        rows = iter(scored)
        return metrics, [[next(rows) for _ in group.rollouts] for group in groups]

    def _accumulate(self, pupils: list[Pupil], step: int, clock: Clock) -> tuple[dict[str, float], list[Scored]]:
        """The batch's gradients; its loss and clip ratios, and every rollout's scores in the order of `pupils`."""
        config = self.config
        scorer = Scorer(self.model, self.renderer.pad_id, config.temperature, config.credit, clock)
        items = self._items([p.rollout for p in pupils])
        total, clipped, scored = 0.0, defaultdict[str, float](float), dict[int, Scored]()
        for number, batch in enumerate(microbatches([p.rollout for p in pupils], config.tokens_per_microbatch)):
            chosen = [pupils[i] for i in batch]
            rollouts = [p.rollout for p in chosen]
            student = forward(self.model, [r.prompt_ids for r in rollouts], rollouts, self.renderer.pad_id)
            tokens = LossTokens.of(rollouts, student.device)
            scores = scorer.score(chosen, tokens, student, salt=1_000 * step + number)
            loss, found = self._loss(student, tokens, [p.advantage for p in chosen], scores, items)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            for name in (n for n in found if n.startswith("clip_ratio/")):
                clipped[name] += found[name].item() * len(student)
            scored.update(zip(batch, scores.scored))
        count = sum(sum(p.rollout.generated) for p in pupils)
        losses = {"loss": total, **{name: value / count for name, value in clipped.items()}}
        return losses, [scored[i] for i in range(len(pupils))]

    def _loss(
        self, student: Tensor, tokens: LossTokens, advantages: list[float], scores: Scores, items: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share: the policy loss with weighted advantages, or the distillation that replaces it.

        The ratio is to the engine's log-probs, those of the policy that sampled: it differs from 1 by what engine and
        trainer differ, and epsilon bounds it. Or, corrected, it is to the trainer's own, and so 1, and the difference
        is made good by truncated importance sampling.
        """
        config = self.config
        corrected = config.engine.name == "vllm" and config.vllm_importance_sampling_correction
        weight, bias = head(self.model)
        if config.arm == "direct_sd":
            if scores.teacher_hidden is None:
                return student.sum() * 0.0, {}
            distance = linear_distill_loss(
                student[scores.opined],
                weight,
                scores.teacher_hidden,
                kind=config.distill_kind,
                beta=config.distill_beta,
                reduction="sum",
                bias=bias,
                temperature=config.temperature,
            )
            return distance / items, {}
        return linear_policy_loss(
            student,
            weight,
            tokens.targets,
            tokens.spread(torch.tensor(advantages)) * scores.weights,
            old_logp=None if corrected else tokens.logprobs,
            importance_weights=self._importance(scores, tokens) if corrected else None,
            cu_seqlens=tokens.cu_seqlens,
            loss_type=config.loss_type,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            temperature=config.temperature,
            bias=bias,
            num_items_in_batch=items,
        )

    def _importance(self, scores: Scores, tokens: LossTokens) -> Tensor:  # [N]
        """min(p_trainer / p_engine, C) of each token: what TRL calls token_truncate."""
        ratio = (scores.student_logp - tokens.logprobs).exp()
        return ratio.clamp(max=self.config.vllm_importance_sampling_clip_max)

    def _items(self, rollouts: Sequence[Rollout]) -> float:
        """What the whole batch's loss is divided by, as `linear_policy_loss` defines it; tokens for distillation."""
        if self.config.arm != "direct_sd":
            if self.config.loss_type in ("grpo", "gspo"):
                return float(len(rollouts))
            if self.config.loss_type == "dr_grpo":
                return float(len(rollouts) * self.config.model.max_length)
        return float(sum(sum(r.generated) for r in rollouts))

    def _apply(self, rate: float) -> float:
        """Clip, step, clear; give the gradient's norm before clipping. One that is not finite moves nothing."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if isfinite(norm):
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm


def mismatch(scored: Sequence[Scored]) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's, at the tokens that were sampled; names as in TRL.

    The ratio is that of the probabilities, trainer over engine, before it is truncated.
    """
    gaps = torch.cat([(s.student_logp - torch.tensor(s.rollout.logprobs))[_own(s)] for s in scored])
    ratio = gaps.exp()
    return {
        "sampling/sampling_logp_difference/mean": gaps.abs().mean().item(),
        "sampling/sampling_logp_difference/max": gaps.abs().max().item(),
        "sampling/importance_sampling_ratio/min": ratio.min().item(),
        "sampling/importance_sampling_ratio/mean": ratio.mean().item(),
        "sampling/importance_sampling_ratio/max": ratio.max().item(),
    }


def mean_entropy(scored: Sequence[Sequence[Scored]]) -> dict[str, float]:
    """The student's entropy over all generated tokens, in nats."""
    values = torch.cat([s.student_entropy[_own(s)] for row in scored for s in row])
    return {"entropy": values.mean().item()}


def invalid_credit(groups: Sequence[Group], scored: Sequence[Sequence[Scored]], config: Config) -> str:
    """Why this step's credit cannot be what the config asked for, or nothing: such a run is invalid and must say so."""
    taught = [s for g, row in zip(groups, scored) if g.reference for s in row]
    if not taught:
        return scarce_references(groups, config)
    if any(s.divergence.requires_grad or s.weights.requires_grad for s in taught):
        return "the divergence carries a gradient"
    if all(bool((s.divergence == 0).all()) for s in taught):
        return "every divergence is 0: the teacher does not read the reference"
    inert = config.arm == "direct_sd" or config.credit.rule == "none" or config.credit.gamma == 0
    if not inert and all(bool((s.weights == 1).all()) for s in taught):
        return "every weight is 1: no divergence reaches credit.d_floor * credit.start"
    return ""


def scarce_references(groups: Sequence[Group], config: Config) -> str:
    """That most groups which should have a reference have none, and why; nothing where enough have one."""
    mixed = [g for g in groups if g.mixed]
    bare = [g for g in mixed if not g.reference]
    if config.writer.name == "none" or 2 * len(bare) <= len(mixed):
        return ""
    reasons = Counter(str(g.reference_info.get("error", "nothing written")) for g in bare).most_common()
    told = ", ".join(f"{reason} {n}" for reason, n in reasons)
    remedy = "; raise writer.max_tokens, thoughts count too" if "truncated" in dict(reasons) else ""
    return f"{len(bare)} of {len(mixed)} mixed groups have no reference and train with W = 1 ({told}{remedy})"


def _own(s: Scored) -> Tensor:
    return torch.tensor(s.rollout.generated, dtype=torch.bool)
