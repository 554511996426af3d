"""Tile sizes by kernel and device. Plain data, chosen by the device's capability: nothing is probed or tuned on import.

Where the figures come from: docs/triton.md. A program makes block_n x block_v logits at a time, from block_h columns of
hidden and weight per step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    block_n: int  # tokens
    block_v: int  # vocab ids
    block_h: int  # columns of hidden and weight per step
    num_warps: int
    num_stages: int  # steps in flight
    programs_per_sm: int = 1  # at one time
    flatten: bool = False  # forward kernels: load the next tile's first steps while this one's logits are summed
    stacked: bool = False  # kernels of two heads: where these have one weight, they are one product of 2 block_n rows
    guarded: bool = False  # forward kernels: guard all products at once, see `tiles.any_nan`


INTERPRETER = Config(16, 64, 32, 1, 1)
Table = dict[str, dict[int, tuple[Config, ...]]]  # kernel -> major compute capability -> configurations; the first runs

# For operands of 2 bytes. A tuning run also tries those after the first. `own_pair_stats` is `pair_stats` for a teacher
# with a weight of its own.
HALF: Table = {
    "head_stats": {
        8: (Config(128, 128, 32, 8, 3), Config(128, 128, 64, 8, 3)),
        9: (
            Config(128, 256, 64, 8, 4),
            Config(128, 256, 64, 8, 4, flatten=True),
            Config(128, 256, 64, 8, 3),
            Config(128, 128, 64, 8, 4),
        ),
        10: (Config(128, 128, 64, 8, 4, guarded=True), Config(128, 128, 64, 8, 3, guarded=True)),
    },
    "pair_stats": {
        8: (Config(64, 64, 64, 4, 3, programs_per_sm=2, stacked=True), Config(64, 64, 64, 8, 3, stacked=True)),
        9: (
            Config(64, 256, 64, 8, 4, stacked=True),
            Config(64, 256, 64, 8, 4, stacked=True, flatten=True),
            Config(64, 256, 64, 8, 3, stacked=True),
            Config(64, 128, 64, 8, 4, stacked=True),
            Config(128, 128, 64, 8, 3),
        ),
        10: (Config(128, 64, 64, 8, 4, guarded=True), Config(64, 128, 64, 8, 4, guarded=True)),
        12: (Config(64, 64, 64, 8, 3, stacked=True),),
    },
    "own_pair_stats": {
        8: (Config(64, 64, 64, 4, 3, programs_per_sm=2),),
        9: (Config(128, 128, 64, 8, 3), Config(64, 128, 64, 4, 3, programs_per_sm=2)),
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

# The same for calls with an epilogue: bias, softcap or temperature, the gradient of a JSD, or top_k. They need more
# registers, so their tiles are smaller.
HALF_EPILOGUE: Table = {
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
# twice the shared memory. With and without an epilogue. On sm_100 one weight must be one product here: Triton 3.6
# cannot pipeline two that share what was converted.
HALF_CAST: Table = {
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
# address of its own. With and without an epilogue, whatever is stored and multiplied.
UNALIGNED: Table = {
    "head_stats": {
        8: (Config(64, 32, 32, 8, 2),),
        9: (Config(64, 32, 32, 8, 2),),
        10: (Config(64, 32, 64, 8, 2, guarded=True),),
    },
    "pair_stats": {
        8: (Config(64, 16, 32, 8, 2),),
        9: (Config(64, 16, 32, 8, 2),),
        10: (Config(64, 16, 64, 8, 1, guarded=True),),  # one stage: as in HALF_CAST
    },
    "own_pair_stats": {
        8: (Config(32, 32, 32, 8, 2),),
        9: (Config(64, 32, 32, 8, 2),),
        10: (Config(64, 16, 64, 8, 2, guarded=True),),
    },
    "mixture_stats": {
        8: (Config(32, 16, 32, 4, 2),),
        9: (Config(64, 32, 32, 8, 2),),
        10: (Config(64, 32, 64, 8, 1),),  # one stage: as in HALF_CAST
    },
    "logprob_grad": {
        8: (Config(64, 16, 32, 8, 2),),
        9: (Config(64, 32, 32, 8, 2),),
        10: (Config(64, 32, 64, 8, 2),),
    },
    "distill_grad": {
        8: (Config(32, 32, 32, 8, 2),),
        9: (Config(64, 32, 32, 8, 2),),
        10: (Config(64, 32, 64, 8, 2, stacked=True),),
    },
}

# For fp32 operands, which take three products in TF32, or one; with and without an epilogue.
FP32: Table = {
    "head_stats": {
        8: (Config(64, 64, 32, 8, 2),),
        9: (Config(64, 64, 32, 8, 2),),
        10: (Config(64, 64, 32, 8, 2, guarded=True),),
        12: (Config(64, 32, 32, 8, 2),),
    },
    "pair_stats": {
        8: (Config(64, 32, 32, 8, 2, stacked=True),),
        9: (Config(64, 32, 32, 8, 2, stacked=True),),
        10: (Config(64, 16, 32, 8, 2, guarded=True),),
    },
    "own_pair_stats": {
        8: (Config(64, 32, 32, 8, 2),),
        9: (Config(64, 32, 32, 8, 2),),
        10: (Config(64, 16, 32, 8, 2, guarded=True),),
    },
    "mixture_stats": {
        8: (Config(64, 32, 32, 8, 2, stacked=True),),
        9: (Config(64, 32, 32, 8, 2, stacked=True),),
        10: (Config(64, 16, 32, 8, 2, stacked=True, guarded=True),),
    },
    "logprob_grad": {
        8: (Config(64, 64, 32, 8, 2),),
        9: (Config(64, 64, 32, 8, 2),),
        10: (Config(64, 64, 32, 8, 2),),
    },
    "distill_grad": {
        8: (Config(64, 32, 32, 8, 2, stacked=True),),
        9: (Config(64, 32, 32, 8, 2, stacked=True),),
        10: (Config(64, 32, 32, 8, 2),),
    },
}
