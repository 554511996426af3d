"""What a step sampled: reward, length, tool use, stop reasons, success by class. Names are `area/what`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, pstdev

from trainer.data import Group, Rollout


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Reward, length, tool use and stop reasons of everything that was sampled, mixed or not. Empty for no groups."""
    rollouts = [r for g in groups for r in g.rollouts]
    if not rollouts:
        return {}
    lengths = [sum(r.generated) for r in rollouts]
    return {
        "reward": fmean(r.reward for r in rollouts),
        "reward_std": fmean(pstdev([r.reward for r in g.rollouts]) for g in groups if g.rollouts),
        "by_group/frac_mixed": fmean(g.mixed for g in groups),
        "by_group/frac_solved": fmean(all(r.success for r in g.rollouts) for g in groups),
        "by_group/frac_failed": fmean(not any(r.success for r in g.rollouts) for g in groups),
        **component_means(rollouts),
        "completions/mean_length": fmean(lengths),
        "completions/max_length": max(lengths),
        "completions/turns": fmean(r.turns[-1] + 1 if r.turns else 0 for r in rollouts),
        **_length_by_outcome(rollouts, lengths),
        **{f"stop/{reason}": n / len(rollouts) for reason, n in sorted(Counter(r.stop for r in rollouts).items())},
        **tool_metrics(rollouts),
        **class_success(rollouts),
    }


def component_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`reward/<name>`: the mean of each component, unweighted, where the reward is a sum of several."""
    names = rollouts[0].components
    return {f"reward/{name}": fmean(r.components[name] for r in rollouts) for name in names}


def _length_by_outcome(rollouts: Sequence[Rollout], lengths: Sequence[int]) -> dict[str, float]:
    won = [n for n, r in zip(lengths, rollouts) if r.success]
    lost = [n for n, r in zip(lengths, rollouts) if not r.success]
    return {f"completions/mean_length_{name}": fmean(ns) for name, ns in (("solved", won), ("failed", lost)) if ns}


def tool_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Calls per rollout, and the share of successes without any (the zero-tool collapse)."""
    calls = [tool_calls(r) for r in rollouts]
    won = [n for n, r in zip(calls, rollouts) if r.success]
    return {
        "tools/per_rollout": fmean(calls),
        "tools/zero_share": fmean(n == 0 for n in calls),
        "tools/zero_share_of_solved": fmean(n == 0 for n in won) if won else 0.0,
    }


def class_success(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Success in each task class that occurs, and their unweighted mean."""
    classes = sorted({r.task.task_class for r in rollouts})
    rates = {c: fmean(bool(r.success) for r in rollouts if r.task.task_class == c) for c in classes}
    return {**{f"success/{c}": rate for c, rate in rates.items()}, "success/class_balanced": fmean(rates.values())}


def tool_calls(rollout: Rollout) -> int:
    """How many tool calls the policy made, well-formed ones only."""
    return sum(len(m.get("tool_calls") or ()) for m in rollout.messages if m["role"] == "assistant")
