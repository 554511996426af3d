"""The exact results, in fp64, and the correctness gate: a provider whose error is too large is not timed.

Values are compared at every token. Gradients are compared at sampled tokens (of the hidden states) and sampled vocab
ids (of the weight): each of these elements still depends on the whole vocabulary, or on all tokens. Errors are judged
relative to those of plain PyTorch in the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import inputs
from bench.cases import Case
from bench.inputs import EPSILON, EPSILON_HIGH, Inputs
from sgcd_kernels import CreditConfig, credit_weights

CHUNK = {"cpu": 1 << 27, "cuda": 1 << 31}  # bytes of one fp64 block of logits
SAMPLED = 64  # tokens and vocab ids whose gradients are checked
TRIED = 2048  # tokens for plain PyTorch's error: one in twenty has most of the divergence, and of its error
CREDIT = CreditConfig()
TINY = 1e-6  # error of fp32 statistics that is always allowed, even if plain PyTorch happens to be closer
BETA = 0.5  # of the Jensen-Shannon divergence
# An error more than this many times that of plain PyTorch in the same dtype is a wrong result, not rounding.
ALLOWED = 10.0
# Weights jump when a divergence crosses a threshold, so that noise in it shifts whole spans of tokens.
JUMPS = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}
ERROR_OF = {"reverse_kl": "kl", "teacher_entropy": "entropy", "logp": "logp"}


def prepare(case: Case) -> tuple[Inputs, Truth]:
    """The complete inputs of a case, and their exact results."""
    i = inputs.make(case)
    truth = Truth(i)
    i = inputs.with_history(i, truth.student_logp, truth.reverse_kl, truth.teacher_entropy)
    truth.i = i
    return i, truth


class Truth:
    """Per-token values [n], fp64, of the tokens with a loss; and gradients on demand."""

    def __init__(self, i: Inputs) -> None:
        self.i = i
        self.weight = i.weight.double()
        block = max(1, CHUNK[i.hidden.device.type] // (8 * i.weight.shape[0]))
        parts = [self._block(rows) for rows in torch.split(i.rows, block)]
        columns = [torch.cat(column) for column in zip(*parts)]
        self.student_logp, self.teacher_logp, self.student_entropy, self.teacher_entropy = columns[:4]
        self.student_lse, self.teacher_lse, self.reverse_kl, self.forward_kl, self.bhattacharyya = columns[4:9]
        self.jsd, self.mixture_kl = columns[9:]

    def _block(self, rows: Tensor) -> tuple[Tensor, ...]:
        i, at = self.i, self.i.ids[rows][:, None]
        z_p, z_q = i.hidden[rows].double() @ self.weight.T, i.teacher[rows].double() @ self.weight.T
        lse_p, lse_q = z_p.logsumexp(-1), z_q.logsumexp(-1)
        log_p, log_q = z_p.sub_(lse_p[:, None]), z_q.sub_(lse_q[:, None])
        p, q = log_p.exp(), log_q.exp()
        log_m = torch.log((1 - BETA) * p + BETA * q)
        mixture_kl = (p * (log_p - log_m)).sum(-1)
        return (
            log_p.gather(1, at)[:, 0],
            log_q.gather(1, at)[:, 0],
            -(p * log_p).sum(-1),
            -(q * log_q).sum(-1),
            lse_p,
            lse_q,
            (p * (log_p - log_q)).sum(-1),
            (q * (log_q - log_p)).sum(-1),
            (p * q).sqrt().sum(-1),
            (1 - BETA) * mixture_kl + BETA * (q * (log_q - log_m)).sum(-1),
            mixture_kl,
        )

    @cached_property
    def weights(self) -> Tensor:  # [n]
        """Token weights W from the exact divergences."""
        n = self.i.ids.numel()
        full = [torch.zeros(n, dtype=x.dtype, device=x.device).index_copy(0, self.i.rows, x) for x in self._signals]
        return credit(self.i, *full)[self.i.rows].double()

    @property
    def _signals(self) -> tuple[Tensor, Tensor]:
        return self.reverse_kl, self.teacher_entropy

    def expected(self, op: str) -> Expected:
        """The exact results of `op`."""
        i, n = self.i, self.i.kept
        if op == "divergence":
            return Expected({"reverse_kl": self.reverse_kl, "teacher_entropy": self.teacher_entropy})
        if op == "credit":
            return Expected({"weights": self.weights})
        if op == "logprob":
            return Expected({"logp": self.student_logp}, i.upstream[i.rows].double())
        if op == "cross_entropy":
            coefficients = torch.full_like(self.student_logp, -1 / n)
            return Expected({"loss": -self.student_logp.mean()}, coefficients)
        if op == "distill":
            return Expected({"loss": self.jsd.mean()}, torch.full_like(self.jsd, 1 / n), of_divergence=True)
        weights = self.weights if op == "sgcd" else torch.ones_like(self.student_logp)
        logp = self.student_logp.clone().requires_grad_()
        loss = policy_loss(logp, i.old_logp[i.rows].double(), i.token_advantages.double() * weights)
        (coefficients,) = torch.autograd.grad(loss, logp)
        return Expected({"loss": loss.detach()}, coefficients)

    @cached_property
    def tokens(self) -> Tensor:  # evenly spaced indices into the tokens with a loss
        return torch.linspace(0, self.i.kept - 1, min(SAMPLED, self.i.kept), device=self.i.rows.device).long()

    @cached_property
    def vocabulary(self) -> Tensor:  # ids that occur as targets, and some that need not
        some = self.i.ids[self.i.rows[self.tokens]][: SAMPLED // 2]
        step = max(1, self.weight.shape[0] // (SAMPLED // 2))
        return torch.unique(torch.cat([some, torch.arange(0, self.weight.shape[0], step, device=some.device)]))  # type: ignore[no-any-return]

    def gradients(self, e: Expected) -> tuple[Tensor, Tensor]:
        """(d hidden at the sampled tokens [s, H], d weight at the sampled ids [v, H]), fp64."""
        assert e.coefficients is not None
        i, rows = self.i, self.i.rows
        at = self.tokens
        d_z = self._d_logits(e, at, None)
        d_hidden = d_z @ self.weight
        d_weight = torch.zeros(self.vocabulary.numel(), i.hidden.shape[1], dtype=torch.float64, device=rows.device)
        for part in torch.split(torch.arange(i.kept, device=rows.device), 1 << 16):
            d_weight += self._d_logits(e, part, self.vocabulary).T @ i.hidden[rows[part]].double()
        return d_hidden, d_weight

    def _d_logits(self, e: Expected, tokens: Tensor, vocabulary: Tensor | None) -> Tensor:
        """The gradient of the logits: c (1[v = y] - p) for log p(y), c (1 - b) p (ln p/m - KL(p||m)) for JSD."""
        assert e.coefficients is not None
        i, rows = self.i, self.i.rows[tokens]
        weight = self.weight if vocabulary is None else self.weight[vocabulary]
        ids = torch.arange(self.weight.shape[0], device=rows.device) if vocabulary is None else vocabulary
        log_p = i.hidden[rows].double() @ weight.T - self.student_lse[tokens][:, None]
        scale = e.coefficients[tokens][:, None]
        if not e.of_divergence:
            return scale * ((ids == i.ids[rows][:, None]).double() - log_p.exp())
        log_q = i.teacher[rows].double() @ weight.T - self.teacher_lse[tokens][:, None]
        log_m = torch.log((1 - BETA) * log_p.exp() + BETA * log_q.exp())
        return scale * (1 - BETA) * log_p.exp() * (log_p - log_m - self.mixture_kl[tokens][:, None])

    @cached_property
    def plain(self) -> dict[str, float]:
        """Errors of plain PyTorch in the inputs' dtype: RMS in nats of values, relative of gradients (fewer tokens)."""
        at, n = self.tokens, self.i.kept
        many = torch.linspace(0, n - 1, min(TRIED, n), device=at.device).long()
        block = max(1, CHUNK[self.i.hidden.device.type] // (8 * self.i.weight.shape[0]))
        with torch.no_grad():
            parts = [self._plain(part)[:4] for part in torch.split(many, block)]
        logp, kl, entropy, jsd = (torch.cat(column) for column in zip(*parts))
        grads = []
        for output, upstream in ((0, self.i.upstream[self.i.rows[at]]), (3, torch.ones_like(self.jsd[at]).float())):
            *values, x = self._plain(at)
            values[output].backward(upstream)  # type: ignore[no-untyped-call]
            assert x.grad is not None
            grads.append(x.grad)
        one = Expected({}, torch.ones_like(self.jsd), of_divergence=True)
        given = Expected({}, self.i.upstream[self.i.rows].double())
        return {
            "logp": rms(logp, self.student_logp[many]),
            "kl": rms(kl, self.reverse_kl[many]),
            "entropy": rms(entropy, self.teacher_entropy[many]),
            "jsd": rms(jsd, self.jsd[many]),
            "grad": relative(grads[0], self._d_logits(given, at, None) @ self.weight),
            "jsd_grad": relative(grads[1], self._d_logits(one, at, None) @ self.weight),
        }

    def _plain(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """(log p(y), KL, the teacher's entropy, JSD) of these tokens, and the autograd leaf they depend on."""
        rows = self.i.rows[tokens]
        x = self.i.hidden[rows].detach().requires_grad_()
        log_p = F.log_softmax((x @ self.i.weight.T).float(), -1)
        log_q = F.log_softmax((self.i.teacher[rows] @ self.i.weight.T).float(), -1)
        p, q = log_p.exp(), log_q.exp()
        log_m = torch.logaddexp(log_p + math.log(1 - BETA), log_q + math.log(BETA))
        jsd = (1 - BETA) * (p * (log_p - log_m)).sum(-1) + BETA * (q * (log_q - log_m)).sum(-1)
        logp = log_p.gather(1, self.i.ids[rows][:, None])[:, 0]
        return logp, (p * (log_p - log_q)).sum(-1), -(q * log_q).sum(-1), jsd, x


@dataclass(frozen=True)
class Expected:
    """Values by name, per token [n] or a scalar; and the loss's gradient of log p(y) (or of the divergence), [n]."""

    values: dict[str, Tensor]
    coefficients: Tensor | None = None
    of_divergence: bool = False


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:  # all [n]
    """DAPO (arXiv 2503.14476): the clipped surrogate, a mean over tokens."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH) * advantages).mean()


def credit(i: Inputs, divergence: Tensor, teacher_entropy: Tensor) -> Tensor:  # [N] each
    """Token weights by SGCD's rule. No other library has it, so peers are combined with ours."""
    found = credit_weights(divergence, teacher_entropy, i.cu_seqlens, mask=i.mask, turn_ids=i.turns, config=CREDIT)
    return found.weights


def rms(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).square().mean().sqrt())


def relative(value: Tensor, exact: Tensor) -> float:
    """Norm of the error over norm of the exact values."""
    return float((value.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@dataclass(frozen=True)
class Verdict:
    """Errors against fp64: of values in nats (RMS over the tokens; absolute for a loss), of gradients relative."""

    error: float | None
    grad_error: float | None
    reason: str = ""  # why it is wrong; empty if it is right

    @property
    def right(self) -> bool:
        return not self.reason


def judge(op: str, dtype: str, i: Inputs, truth: Truth, outputs: Mapping[str, Tensor]) -> Verdict:
    """Judge a provider's values and, after a backward pass, its `d_hidden` [N, H] and `d_weight` [V, H]."""
    expected = truth.expected(op)
    worst, reasons = 0.0, []
    for name, exact in expected.values.items():
        if name not in outputs:
            return Verdict(None, None, f"wrong: it returned no {name}")
        value = outputs[name].detach()
        if value.numel() == i.mask.numel() != exact.numel():
            value = value.reshape(-1)[i.rows]
        if value.shape != exact.shape:
            return Verdict(None, None, f"wrong: {name} has shape {list(value.shape)}, needs {list(exact.shape)}")
        error, allowed = rms(value, exact), _allowed(op, dtype, name, truth)
        worst = max(worst, error) if error == error else error
        if not error <= allowed:  # a NaN is not
            reasons.append(f"{name} off by {error:.1e}, at most {allowed:.1e} allowed")
    grad_error = None
    if "d_hidden" in outputs:
        d_hidden, d_weight = truth.gradients(expected)
        pairs = (
            ("d_hidden", outputs["d_hidden"].reshape(i.hidden.shape)[i.rows[truth.tokens]], d_hidden),
            ("d_weight", outputs["d_weight"][truth.vocabulary], d_weight),
        )
        plain = truth.plain["jsd_grad" if op == "distill" else "grad"]
        grad_allowed = max(ALLOWED * max(plain, TINY), JUMPS[dtype] if op == "sgcd" else 0.0)
        found = {name: relative(value, exact) for name, value, exact in pairs}
        grad_error = max(found.values(), key=lambda e: float("inf") if e != e else e)
        reasons += [
            f"{name} off by {error:.1e} of its norm, at most {grad_allowed:.1e} allowed"
            for name, error in found.items()
            if not error <= grad_allowed
        ]
    return Verdict(worst, grad_error, "wrong: " + "; ".join(reasons) if reasons else "")


def _allowed(op: str, dtype: str, name: str, truth: Truth) -> float:
    if op == "credit":
        return TINY
    if name == "loss":  # allow every token the error of plain PyTorch's log-probs (or divergences)
        coefficients = truth.expected(op).coefficients
        assert coefficients is not None
        each = truth.plain["jsd" if op == "distill" else "logp"]
        jumps = JUMPS[dtype] if op == "sgcd" else 0.0
        return float(coefficients.abs().sum()) * (ALLOWED * max(each, TINY) + jumps)
    return ALLOWED * max(truth.plain[ERROR_OF[name]], TINY)
