"""Tile sizes by kernel and device. Plain data, chosen by the device's capability: nothing is probed or tuned on import.

Where the figures come from: docs/triton.md. A program of a forward kernel takes `tokens` x `words` logits at a time,
`depth` columns of hidden and weight a step, with `stages` steps in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Config:
    tokens: int
    words: int
    depth: int
    warps: int
    stages: int
    programs: int = 1  # that fit on a multiprocessor at one time
    flat: bool = False  # forward kernels: load the next tile's first steps while this one's logits are folded
    stacked: bool = False  # kernels of two heads: where these have one weight, they are one product of 2 x tokens rows
    guarded: bool = False  # forward kernels: guard all products of a fold at once, see `forward_kernels.any_nan`


INTERPRETER = Config(16, 64, 32, 1, 1)
Table = dict[str, dict[int, tuple[Config, ...]]]  # kernel -> major compute capability -> the first runs

# For operands of 2 bytes. What follows the first is what a tuning run tries. `own_pair_stats` is
# `pair_stats` for two weights.
HALF: Table = {
    "head_stats": {
        8: (Config(128, 128, 32, 8, 3), Config(128, 128, 64, 8, 3)),
        9: (
            Config(128, 256, 64, 8, 4),
            Config(128, 256, 64, 8, 4, flat=True),
            Config(128, 256, 64, 8, 3),
            Config(128, 128, 64, 8, 4),
        ),
        10: (Config(128, 128, 64, 8, 4, guarded=True), Config(128, 128, 64, 8, 3, guarded=True)),
    },
    "pair_stats": {
        8: (Config(64, 64, 64, 4, 3, programs=2, stacked=True), Config(64, 64, 64, 8, 3, stacked=True)),
        9: (
            Config(64, 256, 64, 8, 4, stacked=True),
            Config(64, 256, 64, 8, 4, stacked=True, flat=True),
            Config(64, 256, 64, 8, 3, stacked=True),
            Config(64, 128, 64, 8, 4, stacked=True),
            Config(128, 128, 64, 8, 3),
        ),
        10: (Config(128, 64, 64, 8, 4, guarded=True), Config(64, 128, 64, 8, 4, guarded=True)),
        12: (Config(64, 64, 64, 8, 3, stacked=True),),
    },
    "own_pair_stats": {
        8: (Config(64, 64, 64, 4, 3, programs=2),),
        9: (Config(128, 128, 64, 8, 3), Config(64, 128, 64, 4, 3, programs=2)),
        10: (Config(128, 64, 64, 8, 3, guarded=True),),
    },
    "mixture_stats": {
        8: (Config(64, 32, 32, 8, 3, stacked=True),),
        9: (Config(64, 64, 64, 8, 3, stacked=True),),
        10: (Config(64, 32, 64, 8, 3, stacked=True), Config(128, 32, 64, 8, 3)),
    },
    "logprob_grad": {
        8: (Config(128, 128, 32, 8, 3), Config(128, 128, 64, 8, 3)),
        9: (Config(128, 256, 64, 8, 4), Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 3)),
        10: (Config(128, 128, 64, 8, 4), Config(128, 128, 64, 8, 3)),
    },
    "distill_grad": {
        8: (Config(64, 64, 32, 4, 3, stacked=True),),
        9: (Config(64, 256, 64, 8, 3, stacked=True), Config(64, 128, 64, 8, 3, stacked=True)),
        10: (Config(64, 128, 64, 8, 3), Config(128, 64, 64, 8, 3)),
    },
}

# The same for calls with bias, softcap or temperature, of a JSD's gradient or with top_k: they need more registers, so
# their tiles are smaller.
RICH: Table = {
    "head_stats": {
        8: (Config(128, 64, 32, 8, 3),),
        9: (Config(128, 128, 64, 8, 4),),
        10: (Config(128, 64, 64, 8, 4, guarded=True),),
    },
    "pair_stats": {
        8: (Config(64, 64, 64, 8, 3, stacked=True),),
        9: (Config(64, 128, 64, 8, 4, stacked=True),),
        10: (Config(64, 64, 64, 8, 4, guarded=True),),
    },
    "own_pair_stats": {
        8: (Config(64, 64, 64, 8, 3),),
        9: (Config(64, 64, 64, 8, 4),),
        10: (Config(64, 64, 64, 8, 4, guarded=True),),
    },
    "mixture_stats": {
        8: (Config(64, 32, 32, 8, 3, stacked=True),),
        9: (Config(64, 32, 64, 8, 3, stacked=True),),
        10: (Config(64, 16, 64, 8, 3, stacked=True),),
    },
    "logprob_grad": {
        8: (Config(128, 64, 32, 8, 3),),
        9: (Config(128, 128, 64, 8, 4),),
        10: (Config(128, 128, 64, 8, 4),),
    },
    "distill_grad": {
        8: (Config(64, 64, 32, 8, 3, stacked=True),),
        9: (Config(64, 128, 64, 8, 3, stacked=True),),
        10: (Config(64, 64, 64, 8, 3),),
    },
}

# For operands of 2 bytes where hidden or weight is stored in 4 (an fp32 master weight): a step in flight takes up to
# twice the shared memory. With and without options. On sm_100 one weight must be one product here: Triton 3.6 cannot
# pipeline two that share what was converted.
WIDE: Table = {
    "head_stats": {
        8: (Config(128, 64, 32, 8, 3),),
        9: (Config(128, 128, 64, 8, 3),),
        10: (Config(128, 64, 64, 8, 3, guarded=True),),
    },
    "pair_stats": {
        8: (Config(64, 64, 32, 8, 3, stacked=True),),
        9: (Config(64, 128, 64, 8, 3, stacked=True),),
        10: (Config(64, 32, 64, 8, 3, stacked=True, guarded=True),),
    },
    "own_pair_stats": {
        8: (Config(64, 64, 32, 8, 3),),
        9: (Config(64, 64, 64, 8, 3),),
        10: (Config(64, 64, 64, 8, 3, guarded=True),),
    },
    "mixture_stats": {
        8: (Config(64, 32, 32, 8, 3, stacked=True),),
        9: (Config(64, 32, 64, 8, 3, stacked=True),),
        10: (Config(64, 16, 64, 8, 2, stacked=True),),
    },
    "logprob_grad": {
        8: (Config(128, 64, 32, 8, 3),),
        9: (Config(128, 128, 64, 8, 3),),
        10: (Config(128, 64, 64, 8, 3),),
    },
    "distill_grad": {
        8: (Config(64, 64, 32, 8, 3, stacked=True),),
        9: (Config(64, 64, 64, 8, 3, stacked=True),),
        10: (Config(64, 64, 64, 8, 3, stacked=True),),
    },
}

# For calls whose rows do not lie on sixteen bytes (16 does not divide H, say): every element is loaded by itself, by an
# address of its own. With and without options, whatever is stored and multiplied.
_ODD, _ODD_NARROW, _ODD_SHORT = Config(64, 32, 32, 8, 2), Config(64, 16, 32, 8, 2), Config(32, 32, 32, 8, 2)
_ODD_10 = Config(64, 32, 64, 8, 2)
ODD: Table = {
    "head_stats": {8: (_ODD,), 9: (_ODD,), 10: (replace(_ODD_10, guarded=True),)},
    "pair_stats": {8: (_ODD_NARROW,), 9: (_ODD_NARROW,), 10: (Config(64, 16, 64, 8, 1, guarded=True),)},  # as WIDE
    "own_pair_stats": {8: (_ODD_SHORT,), 9: (_ODD,), 10: (Config(64, 16, 64, 8, 2, guarded=True),)},
    "mixture_stats": {8: (Config(32, 16, 32, 4, 2),), 9: (_ODD,), 10: (replace(_ODD_10, stages=1),)},  # as WIDE
    "logprob_grad": {8: (_ODD_NARROW,), 9: (_ODD,), 10: (_ODD_10,)},
    "distill_grad": {8: (_ODD_SHORT,), 9: (_ODD,), 10: (replace(_ODD_10, stacked=True),)},
}

# For fp32 operands, which take three products in TF32, or one; with and without options.
_WIDE, _NARROW = Config(64, 64, 32, 8, 2), Config(64, 32, 32, 8, 2)
_STACKED = replace(_NARROW, stacked=True)
_NARROWEST = Config(64, 16, 32, 8, 2, guarded=True)
SINGLE: Table = {
    "head_stats": {8: (_WIDE,), 9: (_WIDE,), 10: (replace(_WIDE, guarded=True),), 12: (_NARROW,)},
    "pair_stats": {8: (_STACKED,), 9: (_STACKED,), 10: (_NARROWEST,)},
    "own_pair_stats": {8: (_NARROW,), 9: (_NARROW,), 10: (_NARROWEST,)},
    "mixture_stats": {8: (_STACKED,), 9: (_STACKED,), 10: (replace(_NARROWEST, stacked=True),)},
    "logprob_grad": {8: (_WIDE,), 9: (_WIDE,), 10: (_WIDE,)},
    "distill_grad": {8: (_STACKED,), 9: (_STACKED,), 10: (_NARROW,)},
}


def table_for(operand_bytes: int, rich: bool = False, wide: bool = False, odd: bool = False) -> Table:
    """
    rich: the call has a bias, a softcap or a temperature, makes a JSD's gradient, or looks for the top K.
    wide: hidden or weight is stored in more bytes than are multiplied.
    odd: rows of hidden or weight do not begin and end on sixteen bytes.
    """
    return ODD if odd else SINGLE if operand_bytes == 4 else WIDE if wide else RICH if rich else HALF


def column_of(by_major: dict[int, tuple[Config, ...]], major: int) -> int:
    """Where a table says what runs on devices of compute capability `major`.x.

    Those without a column take that of 8: its instructions (`mma.sync`) are every device's, and its tiles keep to the
    99 KB of shared memory that the smallest of them have (8.6, 8.9, 12.0).
    """
    return major if major in by_major else 8


def config_for(
    kernel: str, major: int, operand_bytes: int, rich: bool = False, wide: bool = False, odd: bool = False
) -> Config:
    """The configuration that runs on devices of compute capability `major`.x; 0 is the interpreter. See `table_for`."""
    if major == 0:
        return INTERPRETER
    by_major = table_for(operand_bytes, rich, wide, odd)[kernel]
    return by_major[column_of(by_major, major)][0]
