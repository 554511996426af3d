"""From tensors to kernel launches: strides, grids, configurations and outputs. Nothing here computes.

Every function takes `Projection`s that `availability.refuses` has let pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgcd_kernels.kernel_inputs import part_of, temperatures
from sgcd_kernels.triton import forward_kernels, grad_kernels
from sgcd_kernels.triton.configs import Config, config_for
from sgcd_kernels.types import Projection

Write = Callable[[int, Tensor], None]  # (first word, [tokens, words] to be filled)
LANGUAGE_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
MAX_SHARES = 64  # of the vocabulary
PARTIAL_BYTES = 32 << 20  # of the statistics of all shares, 11 a token and share at most
PLACES = "x x_stride w w_stride width y y_stride v v_stride teacher_width".split()  # arguments: where rows lie
RESIDENT_BYTES = 12 << 20  # of hidden, beside the words in flight: half of what an SM reaches near it in 50 MB of L2


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
            None if p.bias is None else aligned(p.bias.detach().contiguous()),
            operand_dtype(p),
        )

    @property
    def odd(self) -> bool:
        """Whether rows begin anywhere, or end anywhere: they are then not loaded sixteen bytes at a time."""
        places = (self.x.data_ptr(), self.x.stride(0), self.w.data_ptr(), self.w.stride(0), self.x.shape[1])
        return any(place % 16 for place in places)

    @property
    def stored_bytes(self) -> int:
        """Of the wider of hidden and weight: steps in flight lie in shared memory as they are stored."""
        return max(self.x.element_size(), self.w.element_size())


def aligned(x: Tensor) -> Tensor:
    """The same where 16 divides its address, else a copy: kernels are not compiled anew for a slice of a bias."""
    return x.clone() if x.data_ptr() % 16 else x


def for_rows(kernel: Any, *heads: Head) -> Any:
    """The kernel as it is compiled for these heads' rows."""
    return anywhere(kernel) if any(head.odd for head in heads) else kernel


@functools.cache
def anywhere(kernel: Any) -> Any:
    """A kernel that knows nothing of where rows lie: one for all, whichever of their places 16 happens to divide.

    Else each combination would be compiled, and each with registers of its own.
    """
    varying = [*forward_kernels.VARYING, "entries", "slots"]
    return triton.jit(kernel.fn, do_not_specialize=[*varying, *PLACES])


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


def config_of(kernel: str, p: Projection, *heads: Head, rich: bool = False) -> Config:
    """The configuration for a call on these heads, p's first."""
    tempered = isinstance(p.temperature, Tensor) or p.temperature != 1.0
    rich = rich or tempered or p.softcap is not None or any(head.bias is not None for head in heads)
    operand_bytes = max(head.operand.itemsize for head in heads)
    wide = max(head.stored_bytes for head in heads) > operand_bytes
    return config_for(kernel, major_of(heads[0].x.device), operand_bytes, rich, wide, any(head.odd for head in heads))


def major_of(device: torch.device) -> int:
    """Of the device's compute capability; 0 is Triton's interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def one_weight(student: Head, teacher: Head) -> bool:
    """Whether both heads can be one product of stacked rows."""
    (x, w), (y, v) = (student.x, student.w), (teacher.x, teacher.w)
    same = v.data_ptr() == w.data_ptr() and v.stride() == w.stride() and v.dtype == w.dtype
    return same and teacher.operand == student.operand and x.dtype == y.dtype


def pair_flags(student: Head, teacher: Head, config: Config, even_words: bool) -> dict[str, Any]:
    shared = one_weight(student, teacher)
    return {
        "SHARED": shared,
        "STACKED": shared and config.stacked,
        "EVEN_H": student.x.shape[1] % config.depth == 0,
        "EVEN_G": teacher.x.shape[1] % config.depth == 0,
        "EVEN_V": even_words,
        "OPERAND": LANGUAGE_TYPES[student.operand],
        "TEACHER_OPERAND": LANGUAGE_TYPES[teacher.operand],
        "PRECISION": precision(),
    }


def pair_pointers(student: Head, teacher: Head, rows: Tensor | None) -> tuple[Any, ...]:
    """How every kernel of two heads begins."""
    x, w, y, v = student.x, student.w, teacher.x, teacher.w
    first = (x, rows, x.stride(0), w, w.stride(0), student.bias)
    return (*first, y, y.stride(0), v, v.stride(0), teacher.bias)


def shape_options(config: Config) -> dict[str, Any]:
    return {
        "T": config.tokens,
        "W": config.words,
        "K": config.depth,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def forward_options(config: Config) -> dict[str, Any]:
    return shape_options(config) | {"FLAT": config.flat, "GUARDED": config.guarded}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def token_group(config: Config, *heads: Head) -> int:
    """How many tiles of tokens run together: those whose hidden states keep to a part of the L2 cache.

    Each tile of words makes them read all of these again, and the words once. Were all N tokens to run together, 84 MB
    at N 8192 and H 2560, no cache would hold them, and hidden would come from memory for every tile of words.
    """
    return max(1, RESIDENT_BYTES // sum(config.tokens * h.x.shape[1] * h.x.element_size() for h in heads))


@dataclass(frozen=True)
class Shares:
    """How a forward kernel's work is cut: programs = tiles of tokens x shares of the vocabulary."""

    token_tiles: int
    count: int
    words: int  # of a share, a multiple of a tile's


def shares_of(n: int, vocab: int, config: Config, slots: int, group: int) -> Shares:
    """The shares that finish soonest, where `slots` programs run at a time and all take as long.

    At least as many as let one group of token tiles keep all slots busy: else several groups would run together.
    """
    token_tiles, word_tiles = ceil_div(n, config.tokens), ceil_div(vocab, config.words)

    def duration(count: int) -> int:
        return ceil_div(token_tiles * count, slots) * ceil_div(word_tiles, count)

    most = min(word_tiles, MAX_SHARES, max(1, PARTIAL_BYTES // (11 * 4 * max(n, 1))))
    least = min(most, ceil_div(slots, max(1, min(group, token_tiles))))
    count = min(range(least, most + 1), key=duration)
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
    config = config_of("head_stats", p, head)
    group = token_group(config, head)
    cut = shares_of(n, vocab, config, slots_of(head.x.device, config), group)
    out = head.x.new_empty((cut.count, 4, n), dtype=torch.float32)
    if n == 0:
        return out
    for_rows(forward_kernels.head_stats_kernel, head)[(cut.token_tiles * cut.count,)](
        head.x, p.rows, head.x.stride(0), head.w, head.w.stride(0), head.bias, targets, temperatures(p), p.softcap,
        out, n, vocab, head.x.shape[1], cut.words, cut.token_tiles, cut.count, group,
        EVEN_H=head.x.shape[1] % config.depth == 0, EVEN_V=vocab % config.words == 0,
        OPERAND=LANGUAGE_TYPES[head.operand], PRECISION=precision(), **forward_options(config),
    )  # fmt: skip
    return out


def pair_config(student: Projection, head: Head, other: Head, peaks: bool = False) -> Config:
    return config_of("pair_stats" if one_weight(head, other) else "own_pair_stats", student, head, other, rich=peaks)


def pair_stats(
    student: Projection,
    teacher: Projection,
    targets: Tensor,  # [n]
    peaks: Tensor | None = None,  # [3, word tiles, n], written
) -> Tensor:  # [shares, 11, n]
    """Those of both heads, then a_p, a_q and the overlap."""
    head, other, n, vocab = Head.of(student), Head.of(teacher), student.num_rows, student.weight.shape[0]
    config = pair_config(student, head, other, peaks is not None)
    group = token_group(config, head, other)
    cut = shares_of(n, vocab, config, slots_of(head.x.device, config), group)
    out = head.x.new_empty((cut.count, 11, n), dtype=torch.float32)
    if n == 0:
        return out
    for_rows(forward_kernels.pair_stats_kernel, head, other)[(cut.token_tiles * cut.count,)](
        *pair_pointers(head, other, student.rows), targets, temperatures(student), student.softcap, out,
        peaks, n, vocab, head.x.shape[1], other.x.shape[1], cut.words, cut.token_tiles, cut.count, group,
        **pair_flags(head, other, config, vocab % config.words == 0), **forward_options(config),
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
    config = config_of("mixture_stats", student, head, other)
    group = token_group(config, head, other)
    cut = shares_of(n, vocab, config, slots_of(head.x.device, config), group)
    out = head.x.new_empty((cut.count, 3, n), dtype=torch.float32)
    if n == 0:
        return out
    for_rows(forward_kernels.mixture_stats_kernel, head, other)[(cut.token_tiles * cut.count,)](
        *pair_pointers(head, other, student.rows), normalisers, temperatures(student), student.softcap, beta, out,
        n, vocab, head.x.shape[1], other.x.shape[1], cut.words, cut.token_tiles, cut.count, group,
        **pair_flags(head, other, config, vocab % config.words == 0), JSD=jsd, FLAT=config.flat,
        **shape_options(config),
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

    def writer(self, p: Projection, tokens: slice) -> Write:
        """For a range of the computed tokens, p being the head on these."""
        head, n, vocab, width = Head.of(p), p.num_rows, p.weight.shape[0], p.hidden.shape[1]
        kernel = for_rows(grad_kernels.logprob_grad_kernel, head)
        config = config_of("logprob_grad", p, head)
        group = token_group(config, head)
        per_token = [
            None if x is None else x[tokens] for x in (self.lse, self.scale, self.d_logp, self.entropy, self.d_entropy)
        ]
        inputs = (
            head.x, p.rows, head.x.stride(0), head.w, head.w.stride(0), head.bias, self.target[tokens],
            temperatures(p), p.softcap, *per_token,
        )  # fmt: skip

        def write(first: int, out: Tensor) -> None:
            count = out.shape[1]
            token_tiles, word_tiles = ceil_div(n, config.tokens), ceil_div(count, config.words)
            kernel[(token_tiles * word_tiles,)](
                *inputs, out, out.stride(0), n, vocab, width, first, count, token_tiles, word_tiles, group,
                EVEN_H=width % config.depth == 0, EVEN_V=count % config.words == 0,
                OPERAND=LANGUAGE_TYPES[head.operand], PRECISION=precision(), **shape_options(config),
            )  # fmt: skip

        return write


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

    def writer(self, p: Projection, tokens: slice) -> Write:
        """For a range of the computed tokens, p being the student's head on these."""
        head, other = Head.of(p), Head.of(part_of(self.teacher, tokens))
        n, vocab, widths = p.num_rows, p.weight.shape[0], (head.x.shape[1], other.x.shape[1])
        kernel = for_rows(grad_kernels.distill_grad_kernel, head, other)
        config = config_of("distill_grad", p, head, other, rich=self.kind == "jsd")
        group = token_group(config, head, other)
        per_token = [x[tokens] for x in (self.lse, self.teacher_lse, self.centre, self.d_loss)]
        inputs = (*pair_pointers(head, other, p.rows), temperatures(p), p.softcap, *per_token, self.beta)

        def write(first: int, out: Tensor) -> None:
            count = out.shape[1]
            token_tiles, word_tiles = ceil_div(n, config.tokens), ceil_div(count, config.words)
            kernel[(token_tiles * word_tiles,)](
                *inputs, out, out.stride(0), n, vocab, *widths, first, count, token_tiles, word_tiles, group,
                KIND=self.kind, **pair_flags(head, other, config, count % config.words == 0), **shape_options(config),
            )  # fmt: skip

        return write
