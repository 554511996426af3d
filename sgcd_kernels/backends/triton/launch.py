"""From tensors to kernel launches: arguments, configurations, grids. Nothing here computes.

What kernels have in common is spelt once, here: heads, logit transform, sizes, compile-time constants. Heads and sizes
are passed one by one, by name, because Triton specialises every number and pointer inside of a tuple, whatever
`do_not_specialize` says. The input of every function is a `Projection` that `backends.registry` has let pass.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgcd_kernels.backends.triton import configs
from sgcd_kernels.backends.triton.configs import Config, Table
from sgcd_kernels.backends.triton.tiles import HeadPlaces
from sgcd_kernels.core.lm_head import Projection

LANGUAGE_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
MAX_SPLITS = 64  # of the vocabulary
PARTIAL_BYTES = 32 << 20  # of the statistics of all vocab splits, 11 per token and split at most
RESIDENT_BYTES = 12 << 20  # of hidden, beside the weight in flight: half of what an SM reaches near it in 50 MB of L2


class Transform(NamedTuple):
    """The logit transform of a call; of two heads all but the bias is common."""

    bias: Tensor | None  # [V]
    teacher_bias: Tensor | None  # [V]
    softcap: float | None
    temperature: Tensor | None  # [n]


class ForwardSizes(NamedTuple):
    """Of a forward kernel, whose programs are token tiles x vocab splits."""

    n: int
    vocab: int
    vocab_per_split: int  # a multiple of BLOCK_V
    token_tiles: int
    num_splits: int
    group_n: int  # token tiles that run together

    @property
    def grid(self) -> tuple[int]:
        return (self.token_tiles * self.num_splits,)


class ChunkSizes(NamedTuple):
    """Of a gradient kernel, whose programs are token tiles x vocab tiles of a chunk."""

    n: int
    vocab: int
    first_id: int  # of the chunk
    chunk: int  # its vocab ids
    token_tiles: int
    vocab_tiles: int
    group_n: int

    @property
    def grid(self) -> tuple[int]:
        return (self.token_tiles * self.vocab_tiles,)


class EntrySizes(NamedTuple):
    """Of `topk.chosen_logits_kernel`, whose programs are blocks of entries."""

    n: int
    vocab: int
    entries: int
    slots: int  # entries per token


# Kernels are not specialised for sizes: in training they would be compiled anew for each kind of number of tokens.
SIZES = sorted({*ForwardSizes._fields, *ChunkSizes._fields, *EntrySizes._fields})


class Meta(NamedTuple):
    """Compile-time constants of a kernel."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_H: int
    DIVISIBLE_H: bool  # by BLOCK_H: no load of hidden or weight needs a mask
    DIVISIBLE_TEACHER_H: bool
    DIVISIBLE_V: bool  # by BLOCK_V, the vocabulary or the chunk that a kernel writes
    OPERAND: tl.dtype  # what the products multiply
    TEACHER_OPERAND: tl.dtype
    PRECISION: str  # of fp32 products
    SHARED: bool  # both heads have one weight
    STACKED: bool  # and are one product of 2 BLOCK_N rows
    FLATTEN: bool
    GUARDED: bool


@dataclass(frozen=True)
class Head:
    """One head as the kernels take it."""

    hidden: Tensor  # [N, H], columns next to each other
    weight: Tensor  # [V, H], likewise
    bias: Tensor | None  # [V]
    operand: torch.dtype  # what the products multiply

    @staticmethod
    def of(x: Projection) -> Head:
        hidden = x.hidden.detach()
        return Head(
            hidden if hidden.stride(-1) == 1 or hidden.shape[1] == 1 else hidden.contiguous(),
            x.head.weight.detach(),
            None if x.head.bias is None else aligned(x.head.bias.detach().contiguous()),
            operand_dtype(x),
        )

    @property
    def width(self) -> int:
        return int(self.hidden.shape[1])

    def places(self, prefix: str = "") -> dict[str, Any]:
        """Where its rows lie, by the names of the kernels' arguments."""
        place = HeadPlaces(self.hidden, self.hidden.stride(0), self.weight, self.weight.stride(0), self.width)
        return {prefix + name: value for name, value in zip(HeadPlaces._fields, place)}

    @property
    def unaligned(self) -> bool:
        """Whether rows may begin or end between multiples of sixteen bytes: each element is then loaded by itself."""
        x, w = self.hidden, self.weight
        return any(place % 16 for place in (x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0), self.width))

    @property
    def stored_bytes(self) -> int:
        """Of the wider of hidden and weight: steps in flight lie in shared memory as they are stored."""
        return max(self.hidden.element_size(), self.weight.element_size())


def aligned(x: Tensor) -> Tensor:
    """The same where 16 divides its address, else a copy: kernels are not compiled anew for a slice of a bias."""
    return x.clone() if x.data_ptr() % 16 else x


def operand_dtype(x: Projection) -> torch.dtype:
    """Half operands are multiplied as they are, and an fp32 (master) weight is rounded to half as autocast would.

    Not bf16 in the interpreter, which multiplies its bits as integers and truncates where a GPU rounds.
    """
    hidden, weight = x.hidden, x.head.weight
    half = hidden.dtype != torch.float32 and weight.dtype in (hidden.dtype, torch.float32)
    wrong = hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16
    return hidden.dtype if half and not wrong else torch.float32


def pair_places(student: Head, teacher: Head) -> dict[str, Any]:
    return student.places() | teacher.places("teacher_")


def transform(x: Projection, head: Head, teacher: Head | None = None) -> Transform:
    return Transform(head.bias, None if teacher is None else teacher.bias, x.head.softcap, x.temperature_per_row())


def meta(config: Config, vocab: int, head: Head, teacher: Head | None = None) -> Meta:
    """For a head, or a student and a teacher. `vocab` is what the kernel's vocab tiles must fill."""
    shared = teacher is not None and one_weight(head, teacher)
    teacher = head if teacher is None else teacher
    return Meta(
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        DIVISIBLE_H=head.width % config.block_h == 0,
        DIVISIBLE_TEACHER_H=teacher.width % config.block_h == 0,
        DIVISIBLE_V=vocab % config.block_v == 0,
        OPERAND=LANGUAGE_TYPES[head.operand],
        TEACHER_OPERAND=LANGUAGE_TYPES[teacher.operand],
        PRECISION=precision(),
        SHARED=shared,
        STACKED=shared and config.stacked,
        FLATTEN=config.flatten,
        GUARDED=config.guarded,
    )


def precision() -> str:
    """Of fp32 products, as `torch.set_float32_matmul_precision` says: "highest" takes three TF32 products."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def one_weight(student: Head, teacher: Head) -> bool:
    """Whether both heads can be one product of stacked rows."""
    w_p, w_q = student.weight, teacher.weight
    same = w_q.data_ptr() == w_p.data_ptr() and w_q.stride() == w_p.stride() and w_q.dtype == w_p.dtype
    return same and teacher.operand == student.operand and student.hidden.dtype == teacher.hidden.dtype


def options(config: Config) -> dict[str, int]:
    """What Triton itself takes beside a kernel's arguments."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def variant(kernel: Any, *heads: Head) -> Any:
    """The kernel as it is compiled for these heads' rows."""
    return without_alignment(kernel) if any(head.unaligned for head in heads) else kernel


@functools.cache
def without_alignment(kernel: Any) -> Any:
    """A kernel that knows nothing of where rows lie: one for all, whichever of strides and addresses 16 divides.

    Else each combination would be compiled, and each with registers of its own.
    """
    places = [prefix + name for prefix in ("", "teacher_") for name in HeadPlaces._fields]
    return triton.jit(kernel.fn, do_not_specialize=[*SIZES, *places])


def config_of(kernel: str, x: Projection, *heads: Head, has_epilogue: bool = False) -> Config:
    """The configuration for a call on these heads, that of `x` first."""
    temperature = x.head.temperature
    tempered = isinstance(temperature, Tensor) or temperature != 1.0
    has_epilogue = has_epilogue or tempered or x.head.softcap is not None or any(h.bias is not None for h in heads)
    operand_bytes = max(head.operand.itemsize for head in heads)
    needs_cast = max(head.stored_bytes for head in heads) > operand_bytes
    unaligned = any(head.unaligned for head in heads)
    return config_for(kernel, major_of(x.hidden.device), operand_bytes, has_epilogue, needs_cast, unaligned)


def pair_config(student: Projection, head: Head, teacher: Head, has_epilogue: bool = False) -> Config:
    """Of `pair_stats`, and of what makes its tiles again."""
    kernel = "pair_stats" if one_weight(head, teacher) else "own_pair_stats"
    return config_of(kernel, student, head, teacher, has_epilogue=has_epilogue)


def config_for(
    kernel: str,
    major: int,
    operand_bytes: int,
    has_epilogue: bool = False,
    needs_cast: bool = False,
    unaligned: bool = False,
) -> Config:
    """The configuration that runs on devices of compute capability `major`.x; 0 is the interpreter. See `table_for`."""
    if major == 0:
        return configs.INTERPRETER
    by_major = table_for(operand_bytes, has_epilogue, needs_cast, unaligned)[kernel]
    return by_major[column_of(by_major, major)][0]


def table_for(
    operand_bytes: int, has_epilogue: bool = False, needs_cast: bool = False, unaligned: bool = False
) -> Table:
    """The tiles for a kind of call.

    has_epilogue: the call has a bias, a softcap or a temperature, makes a JSD's gradient, or looks for the top K.
    needs_cast: hidden or weight is stored in more bytes than are multiplied.
    unaligned: rows of hidden or weight do not begin and end on sixteen bytes.
    """
    if unaligned:
        return configs.UNALIGNED
    if operand_bytes == 4:
        return configs.FP32
    return configs.HALF_CAST if needs_cast else configs.HALF_EPILOGUE if has_epilogue else configs.HALF


def column_of(by_major: dict[int, tuple[Config, ...]], major: int) -> int:
    """Where a table says what runs on devices of compute capability `major`.x.

    Those without a column take that of 8: its instructions (`mma.sync`) are every device's, and its tiles keep to the
    99 KB of shared memory that the smallest of them have (8.6, 8.9, 12.0).
    """
    return major if major in by_major else 8


def major_of(device: torch.device) -> int:
    """Of the device's compute capability; 0 is Triton's interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def forward_sizes(x: Projection, config: Config, *heads: Head) -> ForwardSizes:
    """The tiling plan of a forward kernel."""
    slots = slots_of(x.hidden.device, config)
    return split_vocab(x.num_rows, x.vocab, config, slots, token_tile_group(config, *heads))


def split_vocab(n: int, vocab: int, config: Config, slots: int, group_n: int) -> ForwardSizes:
    """The number of splits that finishes soonest, where `slots` programs run at a time and all take as long.

    At least as many as let one group of token tiles keep all slots busy: else several groups would run together.
    """
    token_tiles, vocab_tiles = ceil_div(n, config.block_n), ceil_div(vocab, config.block_v)

    def duration(splits: int) -> int:
        return ceil_div(token_tiles * splits, slots) * ceil_div(vocab_tiles, splits)

    most = min(vocab_tiles, MAX_SPLITS, max(1, PARTIAL_BYTES // (11 * 4 * max(n, 1))))
    least = min(most, ceil_div(slots, max(1, min(group_n, token_tiles))))
    tiles_per_split = ceil_div(vocab_tiles, min(range(least, most + 1), key=duration))
    num_splits = ceil_div(vocab_tiles, tiles_per_split)
    return ForwardSizes(n, vocab, tiles_per_split * config.block_v, token_tiles, num_splits, group_n)


def chunk_sizes(x: Projection, first_id: int, chunk: int, config: Config, *heads: Head) -> ChunkSizes:
    """The tiling plan of a gradient kernel, for a chunk of the vocabulary."""
    token_tiles, vocab_tiles = ceil_div(x.num_rows, config.block_n), ceil_div(chunk, config.block_v)
    group_n = token_tile_group(config, *heads)
    return ChunkSizes(x.num_rows, x.vocab, first_id, chunk, token_tiles, vocab_tiles, group_n)


def token_tile_group(config: Config, *heads: Head) -> int:
    """How many token tiles run together: those whose hidden states keep to a part of the L2 cache.

    For each vocab tile they read all of these again, and the tile's rows of the weight once. Were all N tokens to run
    together, 84 MB at N 8192 and H 2560, no cache would hold them, and each vocab tile would read hidden from memory.
    """
    return max(1, RESIDENT_BYTES // sum(config.block_n * h.width * h.hidden.element_size() for h in heads))


def slots_of(device: torch.device, config: Config) -> int:
    """How many programs run at one time."""
    if device.type == "cpu":
        return 2
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * config.programs_per_sm


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
