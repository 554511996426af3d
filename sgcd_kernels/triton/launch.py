"""From tensors to kernel launches: strides, grids, configurations and outputs. Nothing here computes.

Every function takes `Projection`s that `availability.refuses` has let pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sgcd_kernels.triton import forward_kernels, grad_kernels
from sgcd_kernels.triton.configs import INTERPRETER, Config, config_for
from sgcd_kernels.types import Projection
from sgcd_kernels.validation import take

LANGUAGE_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
MAX_SHARES = 64  # of the vocabulary
PARTIAL_BYTES = 32 << 20  # of the statistics of all shares, 11 a token and share at most


@dataclass(frozen=True)
class Head:
    """One head as the kernels take it."""

    x: Tensor  # [N, H], columns next to each other
    w: Tensor  # [V, H], likewise
    bias: Tensor | None  # [V]
    operand: torch.dtype  # what the products multiply

    @classmethod
    def of(cls, p: Projection) -> Head:
        x = p.hidden.detach()
        return cls(
            x if x.stride(-1) == 1 or x.shape[1] == 1 else x.contiguous(),
            p.weight.detach(),
            None if p.bias is None else p.bias.detach().contiguous(),
            operand_dtype(p),
        )


def operand_dtype(p: Projection) -> torch.dtype:
    """Half operands are multiplied as they are, and an fp32 (master) weight is rounded to half as autocast would.

    Not bf16 in the interpreter, which multiplies its bits as integers and truncates where a GPU rounds.
    """
    half = p.hidden.dtype != torch.float32 and p.weight.dtype in (p.hidden.dtype, torch.float32)
    wrong = p.hidden.device.type == "cpu" and p.hidden.dtype == torch.bfloat16
    return p.hidden.dtype if half and not wrong else torch.float32


def precision() -> str:
    """Of fp32 products, as `torch.set_float32_matmul_precision` says: "highest" takes three TF32 products."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def config_of(kernel: str, head: Head) -> Config:
    if head.x.device.type == "cpu":
        return INTERPRETER
    return config_for(kernel, torch.cuda.get_device_capability(head.x.device)[0], head.operand.itemsize)


def temperature_of(p: Projection) -> Tensor | None:  # [n] fp32
    if isinstance(p.temperature, Tensor):
        return take(p.temperature, p.rows).float().contiguous()
    return None if p.temperature == 1.0 else torch.full((p.num_rows,), p.temperature, device=p.hidden.device)


def pair_flags(student: Head, teacher: Head, config: Config, even_words: bool) -> dict[str, Any]:
    same = teacher.w.data_ptr() == student.w.data_ptr() and teacher.w.stride() == student.w.stride()
    return {
        "SHARED": same and teacher.operand == student.operand and teacher.w.dtype == student.w.dtype,
        "EVEN_H": student.x.shape[1] % config.depth == 0,
        "EVEN_G": teacher.x.shape[1] % config.depth == 0,
        "EVEN_V": even_words,
        "OPERAND": LANGUAGE_TYPES[student.operand],
        "TEACHER_OPERAND": LANGUAGE_TYPES[teacher.operand],
        "PRECISION": precision(),
    }


def shape_options(config: Config) -> dict[str, Any]:
    return {
        "T": config.tokens,
        "W": config.words,
        "K": config.depth,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Shares:
    """How a forward kernel's work is cut: programs = tiles of tokens x shares of the vocabulary."""

    token_tiles: int
    count: int
    words: int  # of a share, a multiple of a tile's


def shares_of(n: int, vocab: int, config: Config, slots: int) -> Shares:
    """As few shares as finish soonest, where `slots` programs run at a time and all take as long."""
    token_tiles, word_tiles = ceil_div(n, config.tokens), ceil_div(vocab, config.words)

    def duration(count: int) -> int:
        return ceil_div(token_tiles * count, slots) * ceil_div(word_tiles, count)

    most = min(word_tiles, MAX_SHARES, max(1, PARTIAL_BYTES // (11 * 4 * max(n, 1))))
    count = min(range(1, most + 1), key=duration)
    each = ceil_div(word_tiles, count)
    return Shares(token_tiles, ceil_div(word_tiles, each), each * config.words)


def slots_of(device: torch.device, config: Config) -> int:
    if device.type == "cpu":
        return 2
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * config.programs


def head_stats(p: Projection, targets: Tensor) -> Tensor:  # [shares, 4, n]
    """m, z, s and the target's logit of each share of the vocabulary."""
    head, n, vocab = Head.of(p), p.num_rows, p.weight.shape[0]
    config = config_of("head_stats", head)
    cut = shares_of(n, vocab, config, slots_of(head.x.device, config))
    out = head.x.new_empty((cut.count, 4, n), dtype=torch.float32)
    if n == 0:
        return out
    forward_kernels.head_stats_kernel[(cut.token_tiles * cut.count,)](
        head.x, p.rows, head.x.stride(0), head.w, head.w.stride(0), head.bias, targets, temperature_of(p), p.softcap,
        out, n, vocab, head.x.shape[1], cut.words, cut.token_tiles,
        EVEN_H=head.x.shape[1] % config.depth == 0, EVEN_V=vocab % config.words == 0,
        OPERAND=LANGUAGE_TYPES[head.operand], PRECISION=precision(), **shape_options(config),
    )  # fmt: skip
    return out


def pair_stats(student: Projection, teacher: Projection, targets: Tensor) -> Tensor:  # [shares, 11, n]
    """Those of both heads, then a_p, a_q and the overlap."""
    head, other, n, vocab = Head.of(student), Head.of(teacher), student.num_rows, student.weight.shape[0]
    config = config_of("pair_stats", head)
    cut = shares_of(n, vocab, config, slots_of(head.x.device, config))
    out = head.x.new_empty((cut.count, 11, n), dtype=torch.float32)
    if n == 0:
        return out
    forward_kernels.pair_stats_kernel[(cut.token_tiles * cut.count,)](
        head.x, student.rows, head.x.stride(0), head.w, head.w.stride(0), head.bias,
        other.x, other.x.stride(0), other.w, other.w.stride(0), other.bias,
        targets, temperature_of(student), student.softcap, out,
        n, vocab, head.x.shape[1], other.x.shape[1], cut.words, cut.token_tiles,
        **pair_flags(head, other, config, vocab % config.words == 0), **shape_options(config),
    )  # fmt: skip
    return out


def mixture_stats(
    student: Projection,
    teacher: Projection,
    normalisers: Tensor,  # [4, n]
    beta: float,
    jsd: bool,
) -> Tensor:  # [shares, 3, n]
    """tv, jsd and sum p ln(p / m), the last two only if `jsd`."""
    head, other, n, vocab = Head.of(student), Head.of(teacher), student.num_rows, student.weight.shape[0]
    config = config_of("mixture_stats", head)
    cut = shares_of(n, vocab, config, slots_of(head.x.device, config))
    out = head.x.new_empty((cut.count, 3, n), dtype=torch.float32)
    if n == 0:
        return out
    forward_kernels.mixture_stats_kernel[(cut.token_tiles * cut.count,)](
        head.x, student.rows, head.x.stride(0), head.w, head.w.stride(0), head.bias,
        other.x, other.x.stride(0), other.w, other.w.stride(0), other.bias,
        normalisers, temperature_of(student), student.softcap, beta, out,
        n, vocab, head.x.shape[1], other.x.shape[1], cut.words, cut.token_tiles,
        **pair_flags(head, other, config, vocab % config.words == 0), JSD=jsd, **shape_options(config),
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class LogprobGrad:
    """Writes the gradient of sum(d_logp logp + d_entropy entropy + d_lse lse) in the logits; scale = d_lse - d_logp."""

    target: Tensor  # all [n]
    lse: Tensor
    scale: Tensor
    d_logp: Tensor
    entropy: Tensor | None
    d_entropy: Tensor | None

    def write(self, p: Projection, tokens: slice, first: int, out: Tensor) -> None:
        """Of some tokens in words [first, first + out.shape[1])."""
        head, vocab, count = Head.of(p), p.weight.shape[0], out.shape[1]
        config = config_of("logprob_grad", head)
        token_tiles, word_tiles = ceil_div(p.num_rows, config.tokens), ceil_div(count, config.words)
        entropy = None if self.entropy is None else self.entropy[tokens]
        d_entropy = None if self.d_entropy is None else self.d_entropy[tokens]
        grad_kernels.logprob_grad_kernel[(token_tiles * word_tiles,)](
            head.x, p.rows, head.x.stride(0), head.w, head.w.stride(0), head.bias, self.target[tokens],
            temperature_of(p), p.softcap, self.lse[tokens], self.scale[tokens], self.d_logp[tokens],
            entropy, d_entropy, out, out.stride(0),
            p.num_rows, vocab, head.x.shape[1], first, count, token_tiles, word_tiles,
            EVEN_H=head.x.shape[1] % config.depth == 0, EVEN_V=count % config.words == 0,
            OPERAND=LANGUAGE_TYPES[head.operand], PRECISION=precision(), GROUP=config.group, **shape_options(config),
        )  # fmt: skip


@dataclass(frozen=True)
class DistillGrad:
    """Writes the gradient of sum(d_loss divergence) in the student's logits."""

    teacher: Projection
    kind: str
    beta: float
    lse: Tensor  # all [n]
    teacher_lse: Tensor
    centre: Tensor
    d_loss: Tensor

    def write(self, p: Projection, tokens: slice, first: int, out: Tensor) -> None:
        """Of some tokens in words [first, first + out.shape[1])."""
        teacher = tokens_of(self.teacher, tokens)
        head, other, vocab, count = Head.of(p), Head.of(teacher), p.weight.shape[0], out.shape[1]
        config = config_of("distill_grad", head)
        token_tiles, word_tiles = ceil_div(p.num_rows, config.tokens), ceil_div(count, config.words)
        grad_kernels.distill_grad_kernel[(token_tiles * word_tiles,)](
            head.x, p.rows, head.x.stride(0), head.w, head.w.stride(0), head.bias,
            other.x, other.x.stride(0), other.w, other.w.stride(0), other.bias, temperature_of(p), p.softcap,
            self.lse[tokens], self.teacher_lse[tokens], self.centre[tokens], self.d_loss[tokens], self.beta,
            out, out.stride(0), p.num_rows, vocab, head.x.shape[1], other.x.shape[1],
            first, count, token_tiles, word_tiles,
            KIND=self.kind, GROUP=config.group,
            **pair_flags(head, other, config, count % config.words == 0), **shape_options(config),
        )  # fmt: skip


def tokens_of(p: Projection, tokens: slice) -> Projection:
    """The same head on a range of its computed tokens."""
    if p.rows is not None:
        return Projection(p.hidden, p.weight, p.bias, p.temperature, p.softcap, p.rows[tokens])
    temperature = p.temperature[tokens] if isinstance(p.temperature, Tensor) else p.temperature
    return Projection(p.hidden[tokens], p.weight, p.bias, temperature, p.softcap)
