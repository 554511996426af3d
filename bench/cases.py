"""What is measured: heads of real models, how many tokens, which op in which mode; and the two selections of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MODES = ("forward", "backward", "full")  # full is forward and backward together
METRICS = ("speed", "memory", "error")
DTYPES = ("fp32", "bf16", "fp16")


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
    "tiny": Head(64, 512),  # of no model: for trying the suite itself
}


@dataclass(frozen=True)
class Op:
    """An operation: the modes it has, and its floor in U, one U being the product of hidden states and weight.

    One U is 2 n H V FLOP over the n tokens that are not masked. The floor is what cannot be left out by anybody who
    holds no logits: docs/benchmarks.md derives the numbers.
    """

    floor: dict[str, float]  # mode -> U; 0 where products with the head play no part
    says: str

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(self.floor)


OPS = {
    "logprob": Op({"forward": 1, "backward": 3, "full": 4}, "log p(y) of each token, differentiable"),
    "cross_entropy": Op({"forward": 1, "full": 3}, "mean of -log p(y): supervised fine-tuning"),
    "divergence": Op({"forward": 2}, "what credit reads: KL(student || teacher) and the teacher's entropy, each token"),
    "distill": Op({"forward": 2, "full": 4}, "mean Jensen-Shannon divergence to the teacher"),
    "policy_loss": Op({"forward": 1, "full": 3}, "DAPO's clipped policy loss, one advantage a sequence"),
    "credit": Op({"forward": 0}, "token weights from divergence and entropy; nothing of it multiplies by the head"),
    "sgcd": Op({"full": 5}, "the whole credit step: score, weights, weighted policy loss, gradients"),
}


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cpu_selection(dtypes: tuple[str, ...]) -> list[Case]:
    """`make bench`, what matters most first: under ten minutes on two cores."""
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
    """`make bench-gpu`, what matters most first: under eight minutes on one H200."""

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
