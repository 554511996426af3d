"""The settings of the credit rules, checked on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from sgcd_kernels.core.validation import SMALLEST, check_choice, check_float, check_int, in_tensor, shown

Rule = Literal[
    "sgcd", "gear", "rlsd", "sc_grpo", "egrsd", "dgpo", "turn_level", "uniform", "matched_uniform", "permuted", "none"
]  # fmt: skip
SpanValue = Literal["onset", "own"]


@dataclass(frozen=True)
class CreditConfig:
    """How divergence becomes token weights. Raises ValueError naming the invalid field.

    (P) is stated by SGCD, arXiv 2606.12634; (R) is our choice where the paper is silent, after GEAR, arXiv 2605.11853.
    `d_floor` is .1: with .01, a reference without content (mean KL about .005) still produced spikes in a trial run. A
    float may be a tensor of one element, whose value is checked when it is used.

    >>> CreditConfig(gamma=0.5).clip
    2.0
    >>> CreditConfig(clip=0.5)
    Traceback (most recent call last):
    ValueError: clip is 0.5, needs a finite number in [1.0, 1e+20]
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rule: Rule = "sgcd"
    gamma: float = 1.0  # (P) W = clip(1 + gamma s, 1, clip)
    clip: float = 2.0  # (P) the largest W
    quantile: float = 0.99  # (R) u = d / max(this quantile of the sequence's d, d_floor), clipped to [0, 1]
    d_floor: float = 0.1  # (R) nats
    start: float = 0.1  # (R) a span starts where u > start
    reset: float = 0.02  # (R) and ends when u < reset
    patience: int = 16  # (R) for this many tokens in a row,
    entropy_ratio: float = 1.5  # (R) or when the teacher's entropy is above entropy_ratio times the onset's
    entropy_margin: float = 0.1  # (R) and more than entropy_margin above it, in nats
    span_value: SpanValue = "onset"  # (R) saliency inside a span: the onset's u, or each token's own
    seed: int = 0  # for rule "permuted"
    gear_alpha: float = 0.2  # a in W = a w + 1 - a / 2
    rlsd_lambda: float = 0.5  # arXiv 2604.03128 decays it to 0 over 50 steps; the schedule is the caller's
    rlsd_epsilon: float = 0.2
    sc_grpo_quantile: float = 0.75  # arXiv 2606.18810: c = max(P75, floor) of W = D / (D + c)
    sc_grpo_floor: float = 1e-4
    egrsd_epsilon: float = 0.2  # arXiv 2605.13255
    egrsd_gamma: float = 0.3
    egrsd_floor: float = 0.1
    dgpo_kappa: float = 1.0  # arXiv 2605.03327
    dgpo_tau: float = 0.5
    turn_epsilon: float = 0.2  # (R) e in W = 1 + e tanh(sign(A) z), z the z-score of a turn

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, get_args(Rule))
        check_choice("span_value", self.span_value, get_args(SpanValue))
        check_float("gamma", self.gamma, 0.0)
        check_float("clip", self.clip, 1.0)
        check_float("quantile", self.quantile, SMALLEST, 1.0)
        check_float("start", self.start, 0.0, 1.0)
        check_float("entropy_ratio", self.entropy_ratio, 1.0)
        check_float("entropy_margin", self.entropy_margin, 0.0)
        check_float("reset", self.reset, 0.0)
        if not in_tensor(self.reset) and not in_tensor(self.start) and self.reset > self.start:
            raise ValueError(f"reset is {self.reset}, needs 0 <= reset <= start = {self.start}")
        check_int("patience", self.patience, 1)
        check_int("seed", self.seed, -math.inf, math.inf)
        for name in ("d_floor", "sc_grpo_floor", "dgpo_tau"):
            check_float(name, getattr(self, name), SMALLEST)
        for name in ("egrsd_gamma", "dgpo_kappa"):
            check_float(name, getattr(self, name), 0.0)
        for name in (
            "gear_alpha",
            "rlsd_lambda",
            "rlsd_epsilon",
            "sc_grpo_quantile",
            "egrsd_epsilon",
            "egrsd_floor",
            "turn_epsilon",
        ):
            check_float(name, getattr(self, name), 0.0, 1.0)


DEFAULT = CreditConfig()


def check_config(config: object) -> None:
    """Refuse anything but a CreditConfig."""
    if not isinstance(config, CreditConfig):
        raise ValueError(f"config is {shown(config)} ({type(config).__name__}), needs a CreditConfig")
