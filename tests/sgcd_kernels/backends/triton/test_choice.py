"""When the Triton backend is chosen, refused, and configured; none of it compiles or runs a kernel."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from bench.aot import BF16, OPTIONS, TEACHERS, UNEVEN, WAYS, Mix, configurations
from sgcd_kernels import linear_logprob
from sgcd_kernels.backends import registry
from sgcd_kernels.backends.triton.configs import FP32, HALF, HALF_CAST, HALF_EPILOGUE, INTERPRETER, UNALIGNED
from sgcd_kernels.core.lm_head import LMHead, Projection

pytest.importorskip("triton")
from sgcd_kernels.backends.triton import launch
from sgcd_kernels.backends.triton.launch import config_for


def head(hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor | None = None, **options: Any) -> Projection:
    return Projection(hidden, LMHead(weight, **options), rows)


CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the behaviour without a GPU")


@CPU_ONLY
def test_without_a_gpu_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "no CUDA device" in (registry.triton_unavailable_reason.__wrapped__() or "")
    x = head(torch.randn(2, 4), torch.randn(3, 4))
    assert "runs on CUDA tensors and hidden is on cpu" in (registry._triton_refuses("logprob_forward", x) or "")


def test_auto_never_interprets() -> None:
    x = head(torch.randn(2, 4), torch.randn(3, 4))
    assert "triton" not in registry.backend_for("auto", "logprob_forward", x).logprob_forward.__module__


@CPU_ONLY
def test_fp64_is_for_another_backend() -> None:
    x, w = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="takes float16, bfloat16 and float32 and hidden is"):
        linear_logprob(x, w, torch.tensor([0, 1]), impl="triton")


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MI300 calls itself 9.4, which is no Hopper: a tile of 192 KB would meet 64 KB of shared memory."""
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reason = registry.triton_unavailable_reason.__wrapped__() or ""
    assert "ROCm" in reason or "Triton is not installed" in reason


TABLES = {
    (2, False, False, False): HALF,
    (2, True, False, False): HALF_EPILOGUE,
    (2, True, True, False): HALF_CAST,
    (2, False, True, False): HALF_CAST,
    (2, True, True, True): UNALIGNED,
    (4, False, False, True): UNALIGNED,
    (4, True, False, False): FP32,
}


@pytest.mark.parametrize("kernel", HALF)
@pytest.mark.parametrize("call", TABLES)
def test_every_capability_has_a_configuration(kernel: str, call: tuple[int, bool, bool, bool]) -> None:
    """Those without a column of their own take that of 8, whose tiles fit everywhere: 12.0 has 99 KB, not 227."""
    table = TABLES[call][kernel]
    assert {8, 9, 10} <= set(table)
    for major in (8, 9, 10, 11, 12, 13):
        assert config_for(kernel, major, *call) == table.get(major, table[8])[0]
    assert config_for(kernel, 0, *call) == INTERPRETER


def heads(
    mix: Mix, unaligned: bool = False, bias: bool = False, teacher_bias: bool = False
) -> tuple[launch.Head, launch.Head]:
    """On the CPU, with the operands that a GPU would multiply."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    width = 40 if unaligned else 48
    x, w, y, v = (torch.zeros(4, width, dtype=types[mix.of(name)]) for name in "xwyv")
    biases = (torch.zeros(4) if bias else None, torch.zeros(4) if teacher_bias else None)
    operands = (types[mix.operand], types[mix.of("teacher_operand")])
    return launch.Head(x, w, biases[0], operands[0]), launch.Head(y, v, biases[1], operands[1])


MIXES = sorted({*(mix for mix, _, _ in WAYS), *TEACHERS}, key=str)  # in one order in every process


@pytest.mark.parametrize("major", [8, 9, 10, 12])
@pytest.mark.parametrize("unaligned", [False, True])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_what_the_gate_compiles_is_what_runs(
    mix: Mix, unaligned: bool, major: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "major_of", lambda device: major)
    own, plain = mix in TEACHERS, head(torch.zeros(4, 1), torch.zeros(4, 1))
    names = ("own_pair_stats", "distill_grad", "mixture_stats", *(() if own else ("head_stats", "logprob_grad")))
    for name, (how, given) in itertools.product(names, ((UNEVEN, {}), (OPTIONS, {"bias": True}))):
        both = heads(mix, unaligned, **given)
        taken = both if "pair" in name or "distill" in name or "mixture" in name else both[:1]
        gate = configurations(name, major * 10, mix, how, unaligned, own=True)
        assert launch.config_of(name, plain, *taken) == gate[0]


def test_operands_of_the_gate_are_those_of_a_gpu() -> None:
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for mix in MIXES:
        for x, w, operand in (("x", "w", "operand"), ("y", "v", "teacher_operand")):
            projection = head(*(torch.empty(4, 4, dtype=types[mix.of(name)], device="meta") for name in (x, w)))
            assert launch.operand_dtype(projection) == types[mix.of(operand)], (str(mix), x)


def test_a_master_weight_takes_smaller_tiles_on_hopper() -> None:
    """What is in flight of a step lies in shared memory as it is stored: fp32 in the tiles of bf16 took 288 KB."""
    for name in HALF:
        tile = config_for(name, 9, 2, needs_cast=True)
        assert tile.num_stages * tile.block_h * (2 * 2 * tile.block_n + 4 * tile.block_v) <= 227 << 10


def test_options_choose_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ahead-of-time gate holds free of stack with options is what runs with options, and only there."""
    asked = []
    monkeypatch.setattr(launch, "config_for", lambda *arguments: asked.append(arguments) or HALF[arguments[0]][9][0])
    monkeypatch.setattr(launch, "major_of", lambda device: 9)
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    bias, temperature = torch.zeros(3), torch.ones(2)
    for has_epilogue, projection, other in [
        (False, head(x, w), {}),
        (False, head(x, w, rows=torch.tensor([1])), {}),
        (True, head(x, w, bias=bias), {"bias": True}),
        (True, head(x, w), {"teacher_bias": True}),
        (True, head(x, w, softcap=3.0), {}),
        (True, head(x, w, temperature=0.7), {}),
        (True, head(x, w, temperature=temperature), {}),
    ]:
        launch.config_of("distill_grad", projection, *heads(BF16, **other))
        assert asked.pop() == ("distill_grad", 9, 2, has_epilogue, False, False)


@pytest.mark.parametrize(
    ("x", "w", "unaligned"),
    [
        (torch.zeros(4, 48), torch.zeros(5, 48), False),
        (torch.zeros(4, 48)[1:], torch.zeros(5, 48)[2:], False),
        (torch.zeros(4, 64)[:, :48], torch.zeros(5, 64)[:, 16:], False),
        (torch.zeros(4, 48), torch.zeros(5, 49)[:, :48], True),  # rows of the weight begin anywhere
        (torch.zeros(4, 49)[:, :48], torch.zeros(5, 48), True),
        (torch.zeros(4, 64)[:, 1:49], torch.zeros(5, 48), True),  # hidden begins anywhere
        (torch.zeros(4, 48), torch.zeros(5 * 48 + 1)[1:].view(5, 48), True),
        (torch.zeros(4, 64)[:, :40], torch.zeros(5, 64)[:, :40], True),  # rows end anywhere
    ],
)
def test_rows_are_unaligned_where_sixteen_does_not_divide(x: torch.Tensor, w: torch.Tensor, unaligned: bool) -> None:
    assert launch.Head.of(head(x, w)).unaligned == unaligned


def test_a_slice_of_a_bias_compiles_nothing_anew() -> None:
    for start in (0, 1, 3, 4):
        bias = torch.arange(20.0)[start : start + 8]
        kept = launch.Head.of(head(torch.zeros(2, 4), torch.zeros(8, 4), bias=bias)).bias
        assert kept is not None and kept.data_ptr() % 16 == 0 and torch.equal(kept, bias)


@pytest.mark.parametrize("group_n", [1, 7, 18, 1000])
def test_programs_end_together(group_n: int) -> None:
    config, slots = config_for("pair_stats", 9, 2), 132
    for n, vocab in [(1, 49_152), (100, 248_320), (8192, 151_936), (16_384, 248_320), (1, 5)]:
        sizes = launch.split_vocab(n, vocab, config, slots, group_n)
        splits, per_split = sizes.num_splits, sizes.vocab_per_split
        assert per_split % config.block_v == 0 and (splits - 1) * per_split < vocab <= splits * per_split
        assert sizes.token_tiles * config.block_n >= n
    sizes = launch.split_vocab(8192, 151_936, config, slots, group_n)
    (programs,) = sizes.grid
    assert programs / (-(-programs // slots) * slots) > 0.9  # little of the last wave is idle
    if group_n >= 7:  # fewer would need more splits than there may be
        assert min(group_n, sizes.token_tiles) * sizes.num_splits >= slots  # one group of tokens keeps the device busy


def test_hidden_states_that_run_together_fit_into_the_cache() -> None:
    config = config_for("pair_stats", 9, 2)
    for width in (64, 576, 2560, 4096, 8192):
        x = torch.empty(1, width, dtype=torch.bfloat16)
        group_n = launch.token_tile_group(config, *[launch.Head(x, x, None, torch.bfloat16)] * 2)
        tile = 2 * config.block_n * width * 2
        assert group_n >= 1 and group_n * tile <= launch.RESIDENT_BYTES < (group_n + 1) * tile
