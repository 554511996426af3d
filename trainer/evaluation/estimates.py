"""Unbiased estimates from finished attempts, with intervals: tgc, sgc, pass@1, pass^k.

All of them hold whatever number of attempts a task has, so an attempt that an environment broke is left out and never
counts as a failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb, prod
from statistics import fmean

import torch
from torch import Tensor

from trainer.data import Rollout, Task
from trainer.records.rollout_metrics import class_success, component_means, tool_metrics

N_BOOTSTRAP = 2_000
BOOTSTRAP_SEED = 20_260_612  # its own, so that an evaluation changes nothing else and two runs compare


def summarise(
    tasks: Sequence[Task], rollouts: Sequence[Rollout], refusals: Mapping[str, float], *, samples: int
) -> dict[str, float]:
    """Every figure of one evaluation.

    Args:
        tasks: the whole split.
        rollouts: finished attempts, in any order.
        refusals: task id -> 1 where the polite refuser succeeds, else 0.
        samples: attempts per task that were asked for.

    Returns:
        `tgc` share of tasks solved in one attempt, `sgc` share of scenarios of which one attempt at each task solves
        all, `pass@1` (= tgc), `pass^k` chance that k attempts at a task all succeed, `<x>_low` and `<x>_high` 95 %
        intervals (percentile bootstrap over scenarios: over tasks where each is its own), success by class, tool use,
        `refuser`, and where rewards are graded `reward`, their mean, and `reward/<name>` of each component; {} when no
        attempt finished.
    """
    if not rollouts:
        return {}
    attempts = by_task(rollouts)
    rate = {task: fmean(each) for task, each in attempts.items()}
    graded = any(r.reward != float(bool(r.success)) for r in rollouts)
    solved, whole = scenario_terms(tasks, rate)
    return {
        "tgc": ratio(solved),
        **_interval("tgc", solved),
        **({"sgc": ratio(whole), **_interval("sgc", whole)} if whole else {}),
        "pass@1": ratio(solved),
        **_interval("pass@1", solved),
        **_pass_hats(tasks, attempts, samples),
        **({"reward": fmean(r.reward for r in rollouts), **component_means(rollouts)} if graded else {}),
        **({"refuser": fmean(refusals.values())} if refusals else {}),
        "tasks": len(rate),
        "scenarios": len(whole),
        "mean_length": fmean(sum(r.generated) for r in rollouts),
        **tool_metrics(rollouts),
        **class_success(rollouts),
    }


def by_task(rollouts: Sequence[Rollout]) -> dict[str, list[float]]:
    """The successes of each task's attempts, 1 or 0."""
    attempts: dict[str, list[float]] = {}
    for r in rollouts:
        attempts.setdefault(r.task.id, []).append(float(bool(r.success)))
    return attempts


Terms = list[tuple[float, float]]  # of each scenario: what it adds to a ratio's numerator and to its denominator


def scenario_terms(tasks: Sequence[Task], rate: Mapping[str, float]) -> tuple[Terms, Terms]:
    """The terms of TGC (tasks solved, tasks) and of SGC (chance that all are solved, 1) of each scenario.

    `rate` is the success of each task. A scenario of which a task has none is counted in TGC alone.
    """
    members: dict[str, list[float | None]] = {}
    for task in tasks:
        members.setdefault(task.scenario, []).append(rate.get(task.id))
    known = [[r for r in rates if r is not None] for rates in members.values()]
    solved = [(sum(rates), float(len(rates))) for rates in known if rates]
    whole = [(prod(some), 1.0) for some, rates in zip(known, members.values()) if len(some) == len(rates)]
    return solved, whole


def pass_hat(attempts: Mapping[str, Sequence[float]], k: int) -> dict[str, float]:
    """Task -> chance that k attempts at it all succeed, for the tasks that have k: C(solved, k) / C(attempts, k).

    The unbiased estimator of tau-bench (arXiv 2406.12045, section 3).
    """
    counts = {t: (round(sum(each)), len(each)) for t, each in attempts.items() if len(each) >= k}
    return {task: comb(won, k) / comb(n, k) for task, (won, n) in counts.items()}


def _pass_hats(tasks: Sequence[Task], attempts: Mapping[str, Sequence[float]], samples: int) -> dict[str, float]:
    """pass^k with its interval, for 1 < k <= samples."""
    figures: dict[str, float] = {}
    for k in range(2, samples + 1):
        terms, _ = scenario_terms(tasks, pass_hat(attempts, k))
        if terms:
            figures |= {f"pass^{k}": ratio(terms), **_interval(f"pass^{k}", terms)}
    return figures


def bootstrap(terms: Terms, *, seed: int = BOOTSTRAP_SEED, draws: int = N_BOOTSTRAP) -> tuple[float, float]:
    """The 95 % percentile interval of a ratio, resampling scenarios, since tasks of one scenario succeed together."""
    table = torch.tensor(terms, dtype=torch.float64)  # [S, 2]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(terms), (draws, len(terms)), generator=generator)
    sums: Tensor = table[chosen].sum(1)  # [draws, 2]
    low, high = torch.quantile(sums[:, 0] / sums[:, 1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _interval(name: str, terms: Terms) -> dict[str, float]:
    low, high = bootstrap(terms)
    return {f"{name}_low": low, f"{name}_high": high}


def ratio(terms: Terms) -> float:
    """The sum of the numerators over the sum of the denominators."""
    return sum(n for n, _ in terms) / sum(d for _, d in terms)
