"""Drawing one token per row from logits, with its log-prob under the distribution it was drawn from."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,  # [R, V]
    temperature: Tensor,  # [R], 0 is greedy
    top_p: Tensor,  # [R]
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # ids [R], logp [R] fp32
    """Sample by inverting the cumulative distribution: one uniform number per row, whatever the vocabulary.

    The log-probs are those of the *processed* distribution (after temperature and top-p; a greedy choice has log-prob
    0): the importance ratio of training needs the distribution that was sampled from, not the model's own.
    """
    logits = logits.float()
    greedy = temperature == 0
    if bool((temperature != 1).any()):
        logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
    logp = logits.log_softmax(-1)
    if bool((top_p < 1).any()):
        logp = _nucleus(logp, top_p)
    uniform = torch.rand(len(logits), 1, generator=generator, device=logits.device)
    ids = _invert(logp.exp(), uniform)
    if not bool(greedy.any()):
        return ids, logp.gather(1, ids[:, None])[:, 0]
    ids = torch.where(greedy, logits.argmax(-1), ids)
    return ids, logp.gather(1, ids[:, None])[:, 0].masked_fill(greedy, 0.0)


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative probability exceeds `uniform`; never one of probability 0."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    point = torch.minimum(uniform * total, below_total)
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


def _nucleus(logp: Tensor, top_p: Tensor) -> Tensor:
    """Keep the fewest tokens whose mass reaches top_p, renormalised. The likeliest token always stays."""
    ordered, order = logp.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p[:, None])
    dropped &= top_p[:, None] < 1
    return logp.masked_fill(dropped, -torch.inf).log_softmax(-1)
