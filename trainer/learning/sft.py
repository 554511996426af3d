"""Supervised fine-tuning on demonstrations: cross-entropy on the assistant's tokens, never on what it observed.

The head is applied by `sgcd_kernels.linear_logprob`, so the logits are not materialised here either.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgcd_kernels import OutputHead, linear_logprob, output_head
from trainer.learning.packing import right_pad


@dataclass(frozen=True)
class Example:
    """One demonstration: token ids, and which of them the assistant generates."""

    ids: list[int]
    loss_mask: list[bool]


def batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches for ever, in a new order each epoch; neighbours in length go together, so padding stays small."""
    rng = random.Random(seed)
    while True:
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), rng.random()))
        starts = list(range(0, len(order), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield [examples[i] for i in order[start : start + batch_size]]


def sft_loss(model: Any, head: OutputHead, batch: Sequence[Example], pad_id: int, autocast: bool = False) -> Tensor:
    """Mean negative log-likelihood of the batch's assistant tokens; with `autocast` the decoder computes in bf16."""
    device = head.weight.device
    ids = right_pad([e.ids for e in batch], pad_id).to(device)
    mask = right_pad([e.loss_mask for e in batch], False).bool().to(device)[:, 1:]
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state[:, :-1][mask]
    hidden = hidden.to(head.weight.dtype)
    return -linear_logprob(hidden, head.weight, ids[:, 1:][mask], **head.options()).logp.mean()


def microbatches(batch: Sequence[Example], max_tokens: int | None) -> list[list[Example]]:
    """Cut a batch so that no part is larger than `max_tokens` once padded (a part may be one longer example)."""
    parts: list[list[Example]] = []
    for example in batch:
        width = max([len(example.ids), *(len(e.ids) for e in (parts[-1] if parts else []))])
        if parts and (max_tokens is None or width * (len(parts[-1]) + 1) <= max_tokens):
            parts[-1].append(example)
        else:
            parts.append([example])
    return parts


def make_optimisers(model: Any, name: str, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return AdamW over everything, or Muon over the layers' matrices and AdamW over the rest."""
    settings: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.01}
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=learning_rate, **settings)]
    matrices = [p for p in model.get_decoder().layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=learning_rate, **settings)]


def sft(
    model: Any,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    pad_id: int,
    optimiser: str = "adamw",
    warmup_steps: int = 20,
    seed: int = 0,
    tokens_per_microbatch: int | None = None,
    autocast: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train `model` in place with linear warm-up and cosine decay to a tenth of `learning_rate`.

    `optimiser` is "adamw" (fine-tuning) or "muon" (from scratch: halves the steps of the tiny policy).
    `tokens_per_microbatch` bounds the memory of a step, whose loss stays the mean over the batch's assistant tokens.
    """
    optimisers, head = make_optimisers(model, optimiser, learning_rate), output_head(model)

    def rate_factor(step: int) -> float:
        progress = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
        return min(1.0, (step + 1) / max(1, warmup_steps)) * (0.55 + 0.45 * math.cos(math.pi * progress))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate_factor) for o in optimisers]
    model.train()
    stream = batches(examples, batch_size, seed)
    for step in range(steps):
        batch, total = next(stream), 0.0
        for part in microbatches(batch, tokens_per_microbatch):
            share = sum(sum(e.loss_mask) for e in part) / sum(sum(e.loss_mask) for e in batch)
            loss = sft_loss(model, head, part, pad_id, autocast) * share
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepped, schedule in zip(optimisers, schedules):
            stepped.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        on_step(step, total)
    model.eval()
