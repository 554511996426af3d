"""The workloads: heads of real models, numbers of tokens, ops and their modes; the two default selections.

Needs no torch, so that tables can be checked without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MODES = ("forward", "backward", "full")  # full is forward and backward together
METRICS = ("speed", "memory", "error")
DTYPES = ("fp32", "bf16", "fp16")


class UserError(Exception):
    """A usage error: one line on stderr, exit code 2."""


def check_names(what: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Refuse a name that is not among `valid`."""
    valid = list(valid)
    for name in given:
        if name not in valid:
            from sgcd_kernels.core.spelling import explain_choice  # here, because the package imports torch

            raise UserError(f"unknown {what} {name!r}; there are {', '.join(valid)}{explain_choice(name, valid)}")


@dataclass(frozen=True)
class Head:
    """A model's output projection, weight [V, H]."""

    hidden: int
    vocab: int


HEADS = {
    "smollm2": Head(576, 49_152),  # SmolLM2-135M
    "qwen3-0.6b": Head(1024, 151_936),
    "llama3": Head(4096, 128_256),
    "qwen3-8b": Head(4096, 151_936),
    "qwen3.5-4b": Head(2560, 248_320),
    "tiny": Head(64, 512),  # not a real model: for testing the suite
}

# The matmul baseline: the matrix products that each op and mode needs without storing logits, in U. One U is the
# product of hidden states and weight, 2 n H V FLOP over the n tokens that have a loss. 0 if the op has no head.
# docs/benchmarks.md derives the numbers.
PRODUCTS: dict[str, dict[str, float]] = {
    "logprob": {"forward": 1, "backward": 3, "full": 4},
    "cross_entropy": {"forward": 1, "full": 3},
    "divergence": {"forward": 2},
    "distill": {"forward": 2, "full": 4},
    "policy_loss": {"forward": 1, "full": 3},
    "credit": {"forward": 0},
    "sgcd": {"full": 5},
}
OPS = tuple(PRODUCTS)


def modes_of(op: str) -> tuple[str, ...]:
    return tuple(PRODUCTS[op])


@dataclass(frozen=True)
class Case:
    """One workload: all its providers are measured side by side on the same inputs."""

    op: str
    mode: str
    shape: str
    tokens: int
    dtype: str
    device: str = "cpu"

    @property
    def head(self) -> Head:
        return HEADS[self.shape]

    def __str__(self) -> str:
        return f"{self.op} {self.mode} {self.shape} N={self.tokens} {self.dtype}"


def cpu_selection(dtypes: tuple[str, ...]) -> list[Case]:
    """`make bench`, most important first: under ten minutes on two cores."""
    tokens = {"sgcd": (512, 128), "divergence": (512, 256, 128), "policy_loss": (256,)}
    modes = {"sgcd": "full", "divergence": "forward", "policy_loss": "full"}
    singles = [("logprob", "forward"), ("logprob", "full"), ("cross_entropy", "full"), ("distill", "full")]
    first, *others = dtypes
    cases = [Case("credit", "forward", "smollm2", 4096, "fp32")]
    cases += [Case(op, modes[op], "smollm2", n, first) for op, counts in tokens.items() for n in counts]
    cases += [Case(op, mode, "smollm2", 128, dtype) for dtype in others for op, mode in modes.items()]
    cases += [Case("divergence", "forward", "qwen3-0.6b", 64, first)]
    cases += [Case(op, mode, "smollm2", 128, first) for op, mode in singles]
    return cases


def gpu_selection() -> list[Case]:
    """`make bench-gpu`, most important first: under eight minutes on one H200."""

    def case(op: str, mode: str, shape: str, n: int) -> Case:
        return Case(op, mode, shape, n, "bf16", "cuda")

    sweep = [("sgcd", "full"), ("divergence", "forward"), ("policy_loss", "full")]
    cases = [case(op, mode, "qwen3.5-4b", n) for n in (16_384, 4_096, 1_024) for op, mode in sweep]
    cases += [case(op, mode, shape, 8_192) for shape in ("qwen3-8b", "smollm2") for op, mode in sweep]
    cases += [case(op, mode, "llama3", 8_192) for op, mode in sweep[1:]]
    singles = [("logprob", mode) for mode in MODES] + [("cross_entropy", "full"), ("distill", "full")]
    cases += [case(op, mode, "qwen3-8b", 8_192) for op, mode in singles]
    cases += [case("sgcd", "full", "qwen3.5-4b", 32_768), case("divergence", "forward", "qwen3.5-4b", 65_536)]
    return [*cases, case("credit", "forward", "qwen3-8b", 65_536)]
