"""One optimiser step: advantages, and for each micro-batch a training forward, its credit, and its part of the loss.

`sgcd_kernels` applies the head to the hidden states of loss tokens only. Micro-batches are formed by the student's
lengths only, and losses are divided by the whole batch's token count, so that every arm sums the same terms in the same
order: if every W is 1, SGCD equals GRPO bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgcd_kernels import OutputHead, PolicyLossConfig, linear_distill_loss, output_head
from sgcd_kernels.ops import sgcd
from sgcd_kernels.ops.policy_inputs import PolicyTokens
from trainer.data import Group, Rollout, Scored
from trainer.learning.packing import microbatches
from trainer.learning.scoring import MicroBatch, Sample, Scorer, prepare_samples
from trainer.protocols import Renderer, Suite
from trainer.stage_clock import Clock

if TYPE_CHECKING:
    from trainer.config import Config

STD_EPSILON = 1e-4  # as in TRL


def group_advantages(groups: Sequence[Group], scale: bool) -> list[float]:
    """(r - mean) / (std + eps) within each group, one per rollout; without `scale`, r - mean."""
    out = []
    for group in groups:
        rewards = [r.reward for r in group.rollouts]
        mean, width = fmean(rewards), stdev(rewards) + STD_EPSILON if scale else 1.0
        out += [(reward - mean) / width for reward in rewards]
    return out


def check_mask(rollout: Rollout, stop_ids: Collection[int]) -> None:
    """Refuse a rollout whose loss mask covers tokens that the policy did not generate.

    A turn is generated tokens followed by observed ones, and a stop token can only be the last generated one: an
    observation marked as generated violates one or the other.
    """
    lists = (rollout.ids, rollout.generated, rollout.logprobs, rollout.turns, rollout.classes)
    if len({len(x) for x in lists}) != 1:
        raise RuntimeError(f"rollout of {rollout.task.id}: its lists have lengths {[len(x) for x in lists]}")
    for i in range(1, len(rollout.ids)):
        if rollout.generated[i] and rollout.turns[i] == rollout.turns[i - 1]:
            if not rollout.generated[i - 1]:
                raise RuntimeError(
                    f"rollout of {rollout.task.id}: token {i} is generated in the middle of an observation"
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
    head: OutputHead
    renderer: Renderer
    suite: Suite
    optimiser: torch.optim.Optimizer

    @staticmethod
    def of(config: Config, model: Any, renderer: Renderer, suite: Suite) -> Learner:
        betas = (config.adam_beta1, config.adam_beta2)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)
        return Learner(config, model, output_head(model), renderer, suite, optimiser)

    def update(self, groups: Sequence[Group], step: int, clock: Clock) -> tuple[dict[str, float], list[list[Scored]]]:
        """Take one step on `groups`; return metrics, and the scores of each rollout (nested like the groups).

        Without groups the weights do not change, and both are empty.

        Raises:
            RuntimeError: a loss mask covers observed tokens.
        """
        if not groups:
            return {}, []
        with clock("update"):
            for rollout in (r for g in groups for r in g.rollouts):
                check_mask(rollout, self.renderer.stop_ids)
        with clock("credit"):
            advantages = group_advantages(groups, self.config.scale_rewards)
            samples = prepare_samples(groups, advantages, self.suite, self.renderer)
        with clock("update"):
            losses, scored = self._accumulate(samples, step, clock)
            rate = self.config.learning_rate * min(1.0, step / max(1, self.config.lr_warmup_steps))
            norm = self._apply(rate)
        metrics = {
            **losses,
            "grad_norm": norm,
            "update/skipped": float(not isfinite(norm)),
            "learning_rate": rate,
            "leak/masked_literal_hits": float(sum(sum(s.masked_literals) for s in samples)),
            **mismatch(scored),
        }
        rows = iter(scored)
        return metrics, [[next(rows) for _ in group.rollouts] for group in groups]

    def _accumulate(self, samples: list[Sample], step: int, clock: Clock) -> tuple[dict[str, float], list[Scored]]:
        """Accumulate the batch's gradients; give its loss, its clip ratios and every rollout's scores in order."""
        config = self.config
        distils = config.arm == "direct_sd"
        read = (self.model, self.head, self.renderer.pad_id)
        scorer = Scorer(*read, config.temperature, config.credit, clock, always=distils)
        items = self._items([s.rollout for s in samples])
        total, clipped, scores = 0.0, defaultdict[str, float](float), dict[int, Scored]()
        for number, indices in enumerate(microbatches([s.rollout for s in samples], config.tokens_per_microbatch)):
            batch = scorer.forward([samples[i] for i in indices])
            scored = scorer.score(batch, salt=1_000 * step + number)
            loss, found, tokens = self._loss(scorer, batch, scored, items)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            for name in (n for n in found if n.startswith("clip_ratio/")):
                clipped[name] += found[name].item() * len(batch.student)
            scores.update(zip(indices, batch.unpack(tokens)))
        count = sum(sum(s.rollout.generated) for s in samples)
        losses = {"loss": total, **{name: value / count for name, value in clipped.items()}}
        return losses, [scores[i] for i in range(len(samples))]

    def _loss(
        self, scorer: Scorer, batch: MicroBatch, scored: sgcd.Scored | None, items: float
    ) -> tuple[Tensor, dict[str, Tensor], sgcd.SGCDTokens]:
        """The micro-batch's part of the loss: the weighted policy loss, or distillation instead.

        The ratio is relative to the engine's log-probs, those of the policy that sampled: engine and trainer differ a
        little, and epsilon bounds the ratio. With the correction it is relative to the trainer's own log-probs, hence
        1, and truncated importance sampling accounts for the difference.
        """
        config = self.config
        if config.arm == "direct_sd":
            return self._distillation(batch, items), {}, scorer.without_loss(batch, scored)
        policy = PolicyLossConfig(config.loss_type, config.epsilon, config.epsilon_high, num_items_in_batch=items)
        given = PolicyTokens(batch.tokens.targets, batch.advantages(), cu_seqlens=batch.tokens.cu_seqlens)
        if config.engine.name != "hf" and config.vllm_importance_sampling_correction:
            own = scorer.without_loss(batch, scored).student_logp
            given = given._replace(importance_weights=self._importance(own, batch.tokens.logprobs))
        else:
            given = given._replace(old_logp=batch.tokens.logprobs)
        return sgcd.weighted_policy_loss(batch.student, scorer.settings(policy), given, scored)

    def _distillation(self, batch: MicroBatch, items: float) -> Tensor:
        if batch.teacher is None:
            return batch.student.sum() * 0.0
        distance = linear_distill_loss(
            batch.student,
            self.head.weight,
            batch.teacher,
            mask=batch.has_teacher,
            kind=self.config.distill_kind,
            beta=self.config.distill_beta,
            reduction="sum",
            **self.head.options(self.config.temperature),
        )
        return distance / items

    def _importance(self, own: Tensor, sampled: Tensor) -> Tensor:  # [N]
        """min(p_trainer / p_engine, C) per token: TRL's token_truncate."""
        return (own - sampled).exp().clamp(max=self.config.vllm_importance_sampling_clip_max)

    def _items(self, rollouts: Sequence[Rollout]) -> float:
        """The divisor of the whole batch's loss, as `linear_policy_loss` defines it; tokens for distillation."""
        if self.config.arm != "direct_sd":
            if self.config.loss_type in ("grpo", "gspo"):
                return float(len(rollouts))
            if self.config.loss_type == "dr_grpo":
                return float(len(rollouts) * self.config.model.max_length)
        return float(sum(sum(r.generated) for r in rollouts))

    def _apply(self, rate: float) -> float:
        """Clip, step, clear; return the gradient's norm before clipping. If it is not finite, no step is taken."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if isfinite(norm):
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm


def mismatch(scored: Sequence[Scored]) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's at the sampled tokens; names as in TRL.

    The ratio is probability under the trainer over probability under the engine, before truncation.
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


def _own(s: Scored) -> Tensor:
    return torch.tensor(s.rollout.generated, dtype=torch.bool)
