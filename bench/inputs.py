"""Inputs that look like training: peaked rows, a teacher close to the student, 30 % of the tokens masked.

Uniform noise is too easy for every kernel: its softmax is flat, nothing overflows, both heads agree everywhere. Here
each hidden state is shifted towards the embedding of one vocab id, by an amount that varies from token to token, so
that most rows are nearly certain and some are not. The teacher is the student plus a little noise, and at one token in
twenty it is shifted towards another id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from bench.cases import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEQUENCES = 8
TURN, OBSERVED = 40, 0.3  # mean tokens per turn, and the fraction of them that are observed, and so masked
SPREAD = 2.0  # standard deviation of the logits of all other ids
IGNORED = -100
EPSILON, EPSILON_HIGH = 0.2, 0.28
CLEAR = 0.1  # least distance of every log ratio from a clip bound


@dataclass(frozen=True)
class Inputs:
    """One batch of B sequences of equal length, packed: N = B T tokens, n of them with a loss."""

    hidden: Tensor  # [N, H]
    teacher: Tensor  # [N, H]
    weight: Tensor  # [V, H], of student and teacher
    targets: Tensor  # [N] int64, IGNORED where masked
    ids: Tensor  # [N] int64, the same without IGNORED: the vocab id of every token
    mask: Tensor  # [N] bool
    rows: Tensor  # [n] int64, where `mask` is true
    turns: Tensor  # [N] int64
    cu_seqlens: Tensor  # [B + 1] int64
    advantages: Tensor  # [B] fp32
    old_logp: Tensor  # [N] fp32
    upstream: Tensor  # [N] fp32, the gradient of log p(y) in op logprob
    divergence: Tensor  # [N] fp32, given to op credit
    teacher_entropy: Tensor  # [N] fp32, given to op credit

    @property
    def sequences(self) -> int:
        return self.advantages.numel()

    @property
    def kept(self) -> int:
        return self.rows.numel()

    @property
    def token_advantages(self) -> Tensor:  # [n]
        return self.advantages.repeat_interleave(self.cu_seqlens.diff())[self.rows]

    def leaves(self) -> Inputs:
        """The same with hidden and weight as new autograd leaves."""
        return replace(self, hidden=self.hidden.detach().requires_grad_(), weight=self.weight.detach().requires_grad_())

    def copy(self) -> Inputs:
        """The same values at other addresses."""
        return Inputs(**{f.name: getattr(self, f.name).clone() for f in fields(self)})


def make(case: Case, seed: int = 0) -> Inputs:
    """The inputs of a case; `bench.truth` sets `old_logp`, `divergence` and `teacher_entropy`."""
    n, head, device = case.tokens, case.head, torch.device(case.device)
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    batch = next(b for b in (SEQUENCES, 4, 2, 1) if n % b == 0 and n // b >= min(n, TURN // 2))
    weight = normal(head.vocab, head.hidden).mul_(SPREAD / head.hidden**0.5)
    ids = torch.randint(head.vocab, (n,), generator=g, device=device)
    other = torch.randint(head.vocab, (n,), generator=g, device=device)
    # A logit L beats V others of standard deviation s when L > ln V + s^2 / 2.
    lean = torch.log(torch.tensor(float(head.vocab))) + SPREAD**2 / 2 + 3 + 3 * normal(n)
    hidden = normal(n, head.hidden)
    hidden += _towards(weight[ids], lean, hidden)
    dissent = torch.rand(n, generator=g, device=device) < 0.05
    teacher = hidden + 0.03 * normal(n, head.hidden)
    teacher += dissent[:, None] * _towards(weight[other], lean, teacher)
    unlikely = torch.rand(n, generator=g, device=device) < 0.1  # tokens at which the policy samples another id
    ids = torch.where(unlikely, other, ids)
    length = n // batch
    place = torch.arange(n, device=device) % length
    turns = max(1, length // TURN)
    mask = place * turns % length >= OBSERVED * length
    reward = (torch.arange(batch, device=device) % 3 == 0).float()
    blank = torch.zeros(n, device=device)
    dtype = DTYPES[case.dtype]
    return Inputs(
        hidden=hidden.to(dtype),
        teacher=teacher.to(dtype),
        weight=weight.to(dtype),
        targets=ids.masked_fill(~mask, IGNORED),
        ids=ids,
        mask=mask,
        rows=mask.nonzero().squeeze(1),
        turns=place * turns // length,
        cu_seqlens=torch.arange(batch + 1, device=device) * length,
        advantages=reward - reward.mean() if batch > 1 else reward,
        old_logp=blank,
        upstream=normal(n),
        divergence=blank,
        teacher_entropy=blank,
    )


def _towards(embedding: Tensor, lean: Tensor, hidden: Tensor) -> Tensor:  # [N, H]
    """The vector to add to `hidden` so that the embedding's id gets the logit `lean`."""
    gap = lean.to(hidden.device) - (embedding * hidden).sum(1)
    return embedding * (gap / embedding.square().sum(1))[:, None]


def with_history(i: Inputs, logp: Tensor, divergence: Tensor, teacher_entropy: Tensor) -> Inputs:
    """Set old log-probs close to the policy's, and the divergences that op credit starts from; all [n].

    No ratio lies near a clip bound: the gradient jumps there, and the half-precision logits of peers may fall on either
    side, which would count as an error of the provider.
    """
    g = torch.Generator(i.hidden.device).manual_seed(1)
    drift = 0.1 * torch.randn(i.kept, generator=g, device=i.hidden.device)
    for begins in (-math.log(1 - EPSILON), -math.log(1 + EPSILON_HIGH)):
        clear = torch.where(drift < begins, begins - CLEAR, begins + CLEAR)
        drift = torch.where((drift - begins).abs() < CLEAR, clear, drift)
    found = {"old_logp": logp + drift, "divergence": divergence, "teacher_entropy": teacher_entropy}
    blank = torch.zeros_like(i.old_logp)
    return replace(i, **{name: blank.index_copy(0, i.rows, values.float()) for name, values in found.items()})
