"""Tile sizes by kernel and device. Plain data, chosen by the device's capability: nothing is probed or tuned on import.

Where the figures come from: docs/kernels.md. A program of a forward kernel takes `tokens` x `words` logits at a time,
`depth` columns of hidden and weight a step, with `stages` steps in flight.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    tokens: int
    words: int
    depth: int
    warps: int
    stages: int
    programs: int = 1  # that fit on a multiprocessor at one time
    group: int = 8  # tiles of tokens that share a tile of words, gradient kernels only


INTERPRETER = Config(16, 64, 32, 1, 1)

# For operands of 2 bytes. The first of a list is what runs; the others are what a tuning run tries.
HALF: dict[str, dict[int, tuple[Config, ...]]] = {
    "head_stats": {
        8: (Config(128, 128, 32, 8, 3, programs=2), Config(128, 128, 64, 8, 3)),
        9: (Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 4), Config(64, 256, 64, 4, 3)),
        10: (Config(128, 128, 64, 8, 4), Config(128, 128, 64, 8, 3)),
    },
    "pair_stats": {
        8: (Config(64, 64, 64, 4, 3, programs=2), Config(64, 64, 64, 8, 3)),
        9: (Config(64, 128, 64, 4, 3, programs=2), Config(128, 128, 64, 8, 3), Config(64, 128, 64, 8, 3)),
        10: (Config(64, 128, 64, 8, 3), Config(64, 128, 64, 8, 4)),
    },
    "mixture_stats": {
        8: (Config(64, 32, 32, 8, 3),),
        9: (Config(64, 64, 64, 8, 3),),
        10: (Config(64, 32, 64, 8, 3),),
    },
    "logprob_grad": {
        8: (Config(128, 128, 32, 8, 3), Config(128, 128, 64, 8, 3)),
        9: (Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 4), Config(128, 128, 64, 4, 3)),
        10: (Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 4), Config(128, 128, 64, 4, 3)),
    },
    "distill_grad": {
        8: (Config(64, 64, 32, 4, 3),),
        9: (Config(64, 128, 64, 8, 3),),
        10: (Config(64, 128, 64, 8, 3),),
    },
}

# For fp32 operands, which take three or one products in TF32. Two heads in mma.sync's registers fit with fewer words.
_WIDE, _NARROW = Config(64, 64, 32, 8, 2), Config(64, 32, 32, 8, 2)
SINGLE: dict[str, dict[int, tuple[Config, ...]]] = {
    "head_stats": {8: (_WIDE,), 9: (_WIDE,), 10: (_WIDE,)},
    "pair_stats": {8: (_NARROW,), 9: (_WIDE,), 10: (_WIDE,)},
    "mixture_stats": {8: (_NARROW,), 9: (_NARROW,), 10: (_NARROW,)},
    "logprob_grad": {8: (_WIDE,), 9: (_WIDE,), 10: (_WIDE,)},
    "distill_grad": {8: (_NARROW,), 9: (_WIDE,), 10: (_WIDE,)},
}


def config_for(kernel: str, major: int, operand_bytes: int) -> Config:
    """The configuration that runs on devices of compute capability `major`.x; newer ones use the newest known."""
    by_major = (HALF if operand_bytes == 2 else SINGLE)[kernel]
    return by_major[max(known for known in by_major if known <= major)][0]
