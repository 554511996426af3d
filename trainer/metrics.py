"""What a step is measured by. Pure functions from rollouts and token tensors to flat dicts of floats.

They answer the table of pitfalls in docs: is success hidden by doing nothing, does the credit sit on style tokens or at
one position, is it inert or saturated, does the policy start to quote the reference. Names are `area/what`.
`trainer.reporting` writes them down.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from string import punctuation

import torch
from torch import Tensor

from trainer.types import Group, Message, Rollout, TokenClass

W_BINS = (0.5, 0.999, 1.001, 1.25, 1.5, 1.75, 1.999)  # edges; W == 1 and W == c (2) have a bin of their own
N_DECILES = 10
MAX_TURN_SLICES = 8  # later turns share the last slice
INERT_DIVERGENCE = 0.01  # mean KL below which a reference tells the teacher nothing (an empty one measures .005)
PHRASE = 4  # words that make a phrase


@dataclass(frozen=True)
class Scored:
    """A rollout and what the scoring pass said of its tokens; names as in `sgcd_kernels`.

    Tensors are [T], aligned with `rollout.ids`; at observed tokens they hold anything and are not read here.
    """

    rollout: Rollout
    student_logp: Tensor
    teacher_logp: Tensor
    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    weights: Tensor
    saliency: Tensor  # in [0, 1]
    span_ids: Tensor  # the token's credit span, -1 outside every span


def gini(values: Tensor) -> float:
    """Gini coefficient of non-negative values: 0 when spread evenly (or all zero), towards 1 when one holds all."""
    total = values.sum().item()
    if values.numel() == 0 or total <= 0:
        return 0.0
    ordered = values.double().sort().values
    rank = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    return float(
        (2 * (rank * ordered).sum() / (len(ordered) * ordered.sum()) - (len(ordered) + 1) / len(ordered)).clamp(min=0)
    )


def shares(values: Tensor, slices: Tensor, n: int) -> list[float]:
    """The share of the sum of `values` that falls on each of `n` slices; all 0 when the sum is 0."""
    mass = torch.zeros(n, dtype=torch.float64).index_add_(0, slices, values.double())
    total = mass.sum().item()
    return [m / total if total > 0 else 0.0 for m in mass.tolist()]


def tool_calls(rollout: Rollout) -> int:
    """How many tool calls the policy made, well-formed ones only."""
    return sum(len(m.get("tool_calls") or ()) for m in rollout.messages if m["role"] == "assistant")


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
        "by_group/frac_solved": fmean(all(r.reward == 1 for r in g.rollouts) for g in groups),
        "by_group/frac_failed": fmean(all(r.reward == 0 for r in g.rollouts) for g in groups),
        "completions/mean_length": fmean(lengths),
        "completions/max_length": max(lengths),
        "completions/turns": fmean(r.turns[-1] + 1 if r.turns else 0 for r in rollouts),
        **_length_by_outcome(rollouts, lengths),
        **{f"stop/{reason}": n / len(rollouts) for reason, n in sorted(Counter(r.stop for r in rollouts).items())},
        **tool_metrics(rollouts),
        **class_success(rollouts),
    }


def _length_by_outcome(rollouts: Sequence[Rollout], lengths: Sequence[int]) -> dict[str, float]:
    won = [n for n, r in zip(lengths, rollouts) if r.reward == 1]
    lost = [n for n, r in zip(lengths, rollouts) if r.reward != 1]
    return {f"completions/mean_length_{name}": fmean(ns) for name, ns in (("solved", won), ("failed", lost)) if ns}


def tool_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Calls a rollout, and how much of the success was had without any (the zero-tool collapse)."""
    calls = [tool_calls(r) for r in rollouts]
    won = [n for n, r in zip(calls, rollouts) if r.reward == 1]
    return {
        "tools/per_rollout": fmean(calls),
        "tools/zero_share": fmean(n == 0 for n in calls),
        "tools/zero_share_of_solved": fmean(n == 0 for n in won) if won else 0.0,
    }


def class_success(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Success in each task class that occurs, and their unweighted mean."""
    classes = sorted({r.task.task_class for r in rollouts})
    rates = {c: fmean(r.reward for r in rollouts if r.task.task_class == c) for c in classes}
    return {**{f"success/{c}": rate for c, rate in rates.items()}, "success/class_balanced": fmean(rates.values())}


def credit_metrics(scored: Sequence[Scored], cap: float = 2.0) -> dict[str, float]:
    """Where divergence and weight fall, over the generated tokens of all rollouts. Empty when there are none.

    `cap` is the largest weight the rule gives (c). Credit mass is |W - 1|, what the rule adds to or takes from GRPO.
    """
    table = _Table.of(scored)
    if table is None:
        return {}
    mass = (table.weights - 1).abs()
    salient = table.saliency > 0
    spans = sum(len(set(x.span_ids[_mask(x)].tolist()) - {-1}) for x in scored)
    return {
        "entropy": table.student_entropy.mean().item(),
        "credit/teacher_entropy": table.teacher_entropy.mean().item(),
        "credit/d_mean": table.divergence.mean().item(),
        "credit/d_max": table.divergence.max().item(),
        "credit/d_p95": torch.quantile(table.divergence.float()[:_QUANTILE_LIMIT], 0.95).item(),
        "credit/inert": float(table.divergence.mean().item() < INERT_DIVERGENCE),
        "credit/w_mean": table.weights.mean().item(),
        "credit/frac_salient": salient.float().mean().item(),
        "credit/frac_capped": (table.weights >= cap - 1e-6).float().mean().item(),
        "credit/spans": spans / len(scored),
        "credit/span_length": (table.span_ids >= 0).sum().item() / max(1, spans),
        "credit/gini": gini(mass),
        **w_histogram(table.weights),
        **_by_position(table, mass),
        **_by_class(table, mass),
    }


_QUANTILE_LIMIT = 2**24  # torch.quantile takes no more


def w_histogram(w: Tensor) -> dict[str, float]:
    """The share of tokens in each bin of W, `credit/w_hist/<lower edge>`."""
    counts = torch.bucketize(w.double(), torch.tensor(W_BINS, dtype=torch.float64)).bincount(minlength=len(W_BINS) + 1)
    names = ["0", *(f"{edge:g}" for edge in W_BINS)]
    return {f"credit/w_hist/{name}": n / len(w) for name, n in zip(names, counts.tolist())}


def reference_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Supply of references, and whether the policy has begun to speak like them. Empty for no groups."""
    if not groups:
        return {}
    infos = [g.reference_info for g in groups]
    served = [g for g in groups if g.reference]
    return {
        "reference/supplied": len(served) / len(groups),
        "reference/errors": float(sum(bool(i.get("error")) for i in infos)),
        **_count("reference/error", (str(i["error"]) for i in infos if i.get("error"))),
        "reference/sanitiser_hits": float(sum(sum((i.get("sanitiser_hits") or {}).values()) for i in infos)),
        "reference/cached": float(sum(bool(i.get("cached")) for i in infos)),
        "reference/tokens": float(sum(i.get("tokens") or 0 for i in infos)),
        "reference/seconds": float(sum(i.get("seconds") or 0.0 for i in infos)),
        "leak/phrase_rate": fmean(leaked_phrases(g) for g in served) if served else 0.0,
        "leak/argument_overlap": fmean(argument_overlap(g) for g in served) if served else 0.0,
    }


def _count(prefix: str, words: Iterable[str]) -> dict[str, float]:
    return {f"{prefix}/{word}": float(n) for word, n in sorted(Counter(words).items())}


def leaked_phrases(group: Group) -> float:
    """The share of rollouts whose own words hold a phrase of the reference that no prompt or observation held."""
    reference = _phrases(group.reference)
    hits = 0
    for rollout in group.rollouts:
        said = {p for m in rollout.messages if m["role"] == "assistant" for p in _phrases(_text(m))}
        shown = {p for text in _shown(rollout) for p in _phrases(text)}
        hits += bool((said & reference) - shown)
    return hits / max(1, len(group.rollouts))


def argument_overlap(group: Group) -> float:
    """The share of tool-call argument values that are a word of the reference and were shown nowhere else."""
    reference = {word.strip(punctuation) for word in group.reference.lower().split()} - {""}
    taken = []
    for rollout in group.rollouts:
        shown = "\n".join(_shown(rollout)).lower()
        values = [value.lower() for m in rollout.messages for value in _arguments(m)]
        taken += [v in reference and not re.search(rf"(?<!\w){re.escape(v)}(?!\w)", shown) for v in values]
    return fmean(taken) if taken else 0.0


@dataclass(frozen=True)
class _Table:
    """The generated tokens of several rollouts, end to end: [N] each."""

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    weights: Tensor
    saliency: Tensor
    span_ids: Tensor
    turn: Tensor
    decile: Tensor
    token_class: Tensor

    @staticmethod
    def of(scored: Sequence[Scored]) -> _Table | None:
        masks = [_mask(x) for x in scored]
        if not any(bool(m.any()) for m in masks):
            return None
        columns = {
            name: torch.cat([getattr(x, name).detach().cpu()[m] for x, m in zip(scored, masks)])
            for name in ("divergence", "student_entropy", "teacher_entropy", "weights", "saliency", "span_ids")
        }
        turn = torch.cat([torch.tensor(x.rollout.turns)[m] for x, m in zip(scored, masks)])
        token_class = torch.cat([torch.tensor(x.rollout.classes)[m] for x, m in zip(scored, masks)])
        decile = torch.cat([_deciles(int(m.sum())) for m in masks])
        return _Table(**columns, turn=turn, decile=decile, token_class=token_class)


def _mask(x: Scored) -> Tensor:
    return torch.tensor(x.rollout.generated, dtype=torch.bool)


def _deciles(n: int) -> Tensor:
    """The decile of each of `n` tokens in a row."""
    return torch.arange(n) * N_DECILES // max(1, n)


def _by_position(table: _Table, mass: Tensor) -> dict[str, float]:
    turn = table.turn.clamp(max=MAX_TURN_SLICES - 1)
    out: dict[str, float] = {}
    for name, slices, n in (("decile", table.decile, N_DECILES), ("turn", turn, int(turn.max()) + 1)):
        for i, share in enumerate(shares(mass, slices, n)):
            out[f"credit/mass_{name}/{i}"] = share
        for i in range(n):
            if bool((slices == i).any()):
                out[f"credit/d_{name}/{i}"] = table.divergence[slices == i].mean().item()
                out[f"credit/w_{name}/{i}"] = table.weights[slices == i].mean().item()
    return out


def _by_class(table: _Table, mass: Tensor) -> dict[str, float]:
    out: dict[str, float] = {}
    mass_shares = shares(mass, table.token_class, len(TokenClass))
    for kind in TokenClass:
        chosen = table.token_class == kind
        if bool(chosen.any()):
            name = kind.name.lower()
            out[f"credit/d/{name}"] = table.divergence[chosen].mean().item()
            out[f"credit/w/{name}"] = table.weights[chosen].mean().item()
            out[f"credit/mass/{name}"] = mass_shares[kind]
    return out


def _text(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _shown(rollout: Rollout) -> list[str]:
    """What the policy read: its prompt and every observation."""
    return [_text(m) for m in [*rollout.prompt_messages, *rollout.messages] if m["role"] != "assistant"]


def _phrases(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + PHRASE]) for i in range(len(words) - PHRASE + 1)}


def _arguments(message: Message) -> Iterator[str]:
    for call in message.get("tool_calls") or ():
        arguments = call["function"].get("arguments") or "{}"
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            continue
        if isinstance(parsed, dict):
            yield from (str(value) for value in parsed.values())
