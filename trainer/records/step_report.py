"""The report of one step: its metrics, and warnings about what makes it invalid or suspicious."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sgcd_kernels.credit.rules import never_acts
from trainer.data import BugReport, Group, Scored
from trainer.records.bug_reports import NAME
from trainer.records.credit_metrics import credit_metrics, mean_entropy
from trainer.records.credit_validity import invalid_credit, scarce_references
from trainer.records.reference_metrics import reference_metrics
from trainer.records.rollout_metrics import rollout_metrics
from trainer.rollout.dynamic_sampling import Batch
from trainer.stage_clock import Clock

if TYPE_CHECKING:
    from trainer.config import Config

DRIFT = 0.1  # mean difference of log-probs, in nats; bf16 makes some hundredths, other weights make more


def report_step(
    config: Config,
    step: int,
    batch: Batch,
    losses: Mapping[str, float],  # {} when nothing was trained
    scored: Sequence[Sequence[Scored]],  # nested as `batch.train` is
    clock: Clock,
) -> tuple[dict[str, float], list[str]]:
    """The metrics of a finished step, and its warnings."""
    times = clock.metrics()
    if config.arm == "grpo":
        del times["time/sgcd_overhead"]
    tokens = sum(len(r.ids) for g in batch.sampled for r in g.rollouts)
    speed = {"perf/rollout_tokens_per_s": tokens / clock.wall["rollout"]}
    sampled = {**rollout_metrics(batch.sampled), **batch.metrics()}
    bugs = warn_of_bugs(step, batch.bugs)
    if not batch.train:
        nothing = f"step {step}: no group is mixed, nothing to learn from; raise max_resample_times or the tasks"
        return {**sampled, **times, **speed}, [*bugs, nothing]
    credit, credit_warning = report_credit(config, step, batch.train, scored)
    warnings = [*bugs, *warn_of_update(step, losses), *credit_warning]
    return {**sampled, **losses, **credit, **times, **speed}, warnings


def warn_of_bugs(step: int, bugs: Sequence[BugReport]) -> list[str]:
    """Warn of rollouts that were dropped because code failed on them, and say where they are kept."""
    if not bugs:
        return []
    return [
        f"WARNING: step {step}: code failed on {len(bugs)} rollouts, which were dropped ({bugs[-1].error}); please "
        f"report it with {NAME} of the run"
    ]


def warn_of_update(step: int, losses: Mapping[str, float]) -> list[str]:
    """Warn of an update that was skipped, and of an engine whose log-probs are not the trainer's."""
    warnings = []
    if losses["update/skipped"]:
        warnings.append(f"WARNING: step {step}: the gradient is not finite, the weights stay as they are")
    if losses["sampling/sampling_logp_difference/mean"] > DRIFT:
        warnings.append(f"WARNING: step {step}: engine and trainer differ in log-probs; are its weights old?")
    return warnings


def report_credit(
    config: Config, step: int, groups: Sequence[Group], scored: Sequence[Sequence[Scored]]
) -> tuple[dict[str, float], list[str]]:
    """The metrics of credit and references, and a warning if the credit cannot be what the config asked for.

    Where the credit rule cannot act nothing is scored, and there is nothing to say of divergences and weights.
    """
    entropy = mean_entropy(scored)
    if config.arm == "grpo":
        return entropy, []
    was_scored = config.arm == "direct_sd" or not never_acts(config.credit)
    with_teacher = [s for group, row in zip(groups, scored) if group.reference and was_scored for s in row]
    problem = invalid_credit(groups, scored, config)
    metrics = {
        **credit_metrics(with_teacher, config.credit.clip),
        **entropy,
        **reference_metrics(groups),
        "credit/invalid": float(bool(problem)),
    }
    if problem:
        return metrics, [f"WARNING: step {step} is invalid: {problem}"]
    scarce = scarce_references(groups, config)
    return metrics, [f"WARNING: step {step}: {scarce}"] if scarce else []
