"""The correctness gate: what a provider returned, against the truth. A provider that fails it gets no time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bench.inputs import Inputs
from bench.truth import TINY, Truth, relative, rms

# More than this many times the error of plain PyTorch in the same dtype is a wrong answer, not a rounding.
ALLOWED = 10.0
# Weights jump where a divergence crosses a threshold, so that noise in it moves whole spans of tokens.
JUMPS = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}
KIND = {"reverse_kl": "kl", "teacher_entropy": "entropy", "logp": "logp"}

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """Errors against fp64: of values in nats (RMS over the tokens; a loss: absolute), of gradients relative."""

    error: float | None
    grad_error: float | None
    reason: str = ""  # why it is wrong; empty if it is right

    @property
    def right(self) -> bool:
        return not self.reason


def judge(op: str, dtype: str, i: Inputs, truth: Truth, outputs: Outputs) -> Verdict:
    """Compare. `outputs` are the op's values, and `d_hidden` [N, H], `d_weight` [V, H] if there was a backward pass."""
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
    if name == "loss":  # every token may be off by what plain PyTorch's log-probs (or divergences) are off by
        coefficients = truth.expected(op).coefficients
        assert coefficients is not None
        each = truth.plain["jsd" if op == "distill" else "logp"]
        jumps = JUMPS[dtype] if op == "sgcd" else 0.0
        return float(coefficients.abs().sum()) * (ALLOWED * max(each, TINY) + jumps)
    return ALLOWED * max(truth.plain[KIND[name]], TINY)
