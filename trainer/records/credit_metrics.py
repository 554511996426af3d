"""Where the credit of a step falls. Pure functions from scored rollouts to flat dicts of floats; names are `area/what`.

They answer the table of pitfalls in the documentation: does the credit sit on style tokens or at one position, is it
inert or saturated. What `sgcd_loss` reports too has the same name here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgcd_kernels import Credit
from sgcd_kernels.credit.summary import credit_summary, credit_sums
from trainer.data import Scored, TokenClass

W_BINS = (0.5, 0.999, 1.001, 1.25, 1.5, 1.75, 1.999)  # edges; W == 1 and W == c (2) have a bin of their own
N_DECILES = 10
MAX_TURN_SLICES = 8  # later turns share the last slice
LOW_DIVERGENCE = 0.01  # mean KL in nats; an empty reference measures .005


def credit_metrics(scored: Sequence[Scored], clip: float = 2.0) -> dict[str, float]:
    """Where divergence and weight fall, over the generated tokens of all rollouts. Empty when there are none.

    `clip` is the largest weight the rule gives. Credit mass is |W - 1|, what the rule adds to or takes from GRPO.
    `credit/inert` is 1 when every divergence is 0 or every weight is 1; `credit/low_divergence` is 1 when the mean
    divergence is so small that the reference tells the teacher next to nothing.
    """
    table = _Table.of(scored)
    if table is None:
        return {}
    mass = (table.weights - 1).abs()
    credit = Credit(table.weights, table.saliency, table.span_ids)
    everywhere = torch.ones_like(table.weights, dtype=torch.bool)
    summary = credit_summary(credit_sums(credit, table.divergence, table.teacher_entropy, everywhere, clip))
    return {
        "entropy": table.student_entropy.mean().item(),
        **{name: value.item() for name, value in summary.items()},
        "credit/max_divergence": table.divergence.max().item(),
        "credit/p95_divergence": torch.quantile(table.divergence.float()[:_QUANTILE_LIMIT], 0.95).item(),
        "credit/low_divergence": float(table.divergence.mean().item() < LOW_DIVERGENCE),
        "credit/gini": gini(mass),
        **w_histogram(table.weights),
        **_by_position(table, mass),
        **_by_class(table, mass),
    }


def mean_entropy(scored: Sequence[Sequence[Scored]]) -> dict[str, float]:
    """The student's entropy over all generated tokens, in nats."""
    values = torch.cat([s.student_entropy[_mask(s)] for row in scored for s in row])
    return {"entropy": values.mean().item()}


_QUANTILE_LIMIT = 2**24  # torch.quantile takes no more


def w_histogram(w: Tensor) -> dict[str, float]:
    """The share of tokens in each bin of W, `credit/w_hist/<lower edge>`."""
    counts = torch.bucketize(w.double(), torch.tensor(W_BINS, dtype=torch.float64)).bincount(minlength=len(W_BINS) + 1)
    names = ["0", *(f"{edge:g}" for edge in W_BINS)]
    return {f"credit/w_hist/{name}": n / len(w) for name, n in zip(names, counts.tolist())}


def gini(values: Tensor) -> float:
    """Gini coefficient of non-negative values: 0 when spread evenly (or all zero), near 1 when one value holds all."""
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
            for name in ("divergence", "student_entropy", "teacher_entropy", "weights", "saliency")
        }
        columns["span_ids"] = torch.cat(_numbered_through([x.span_ids.cpu()[m] for x, m in zip(scored, masks)]))
        turn = torch.cat([torch.tensor(x.rollout.turns)[m] for x, m in zip(scored, masks)])
        token_class = torch.cat([torch.tensor(x.rollout.classes)[m] for x, m in zip(scored, masks)])
        decile = torch.cat([_deciles(int(m.sum())) for m in masks])
        return _Table(**columns, turn=turn, decile=decile, token_class=token_class)


def _numbered_through(rows: Sequence[Tensor]) -> list[Tensor]:
    """Span ids, which may repeat from one micro-batch to the next, numbered through all rollouts."""
    out, count = [], 0
    for ids in rows:
        inside = ids >= 0
        numbers, places = torch.unique(ids[inside], return_inverse=True)
        out.append(ids.clone().masked_scatter(inside, places + count))
        count += len(numbers)
    return out


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
