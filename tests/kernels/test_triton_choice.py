"""When the Triton backend is chosen, refused, and configured; none of it compiles or runs a kernel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sgcd_kernels import linear_logprob
from sgcd_kernels.backends import resolve
from sgcd_kernels.triton import availability
from sgcd_kernels.triton.configs import HALF, RICH, SINGLE, config_for
from sgcd_kernels.types import Projection

BF16 = torch.bfloat16
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is so without a GPU")


@CPU_ONLY
def test_without_a_gpu_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "no CUDA device" in (availability.unavailable_reason.__wrapped__() or "")
    p = Projection(torch.randn(2, 4), torch.randn(3, 4))
    assert "runs on CUDA tensors and hidden is on cpu" in (availability.refuses("logprob_forward", p) or "")


def test_auto_never_interprets() -> None:
    p = Projection(torch.randn(2, 4), torch.randn(3, 4))
    assert "triton" not in resolve("logprob_forward", "auto", p).__module__


@CPU_ONLY
def test_fp64_is_for_another_backend() -> None:
    pytest.importorskip("triton")
    x, w = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="takes float16, bfloat16 and float32 and hidden is"):
        linear_logprob(x, w, torch.tensor([0, 1]), impl="triton")


@pytest.mark.parametrize("kernel", HALF)
@pytest.mark.parametrize(("operand_bytes", "rich"), [(2, False), (2, True), (4, False), (4, True)])
def test_every_capability_has_a_configuration(kernel: str, operand_bytes: int, rich: bool) -> None:
    table = ((RICH if rich else HALF) if operand_bytes == 2 else SINGLE)[kernel]
    for major, known in ((8, 8), (9, 9), (10, 10), (12, 10)):
        assert config_for(kernel, major, operand_bytes, rich) == table[known][0]


def test_options_choose_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ahead-of-time gate holds free of stack with options is what runs with options, and only there."""
    pytest.importorskip("triton")
    from sgcd_kernels.triton import launch

    asked = []
    monkeypatch.setattr(launch, "config_for", lambda *arguments: asked.append(arguments) or HALF[arguments[0]][9][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x, w, head = torch.randn(2, 4), torch.randn(3, 4), SimpleNamespace(x=torch.empty(0, device="meta"), operand=BF16)
    bias, temperature = torch.zeros(3), torch.ones(2)
    for rich, p in [
        (False, Projection(x, w)),
        (False, Projection(x, w, rows=torch.tensor([1]))),
        (True, Projection(x, w, bias=bias)),
        (True, Projection(x, w, softcap=3.0)),
        (True, Projection(x, w, temperature=0.7)),
        (True, Projection(x, w, temperature=temperature)),
    ]:
        launch.config_of("head_stats", p, head)  # type: ignore[arg-type]
        assert asked.pop() == ("head_stats", 9, 2, rich)


@pytest.mark.parametrize("group", [1, 7, 18, 1000])
def test_work_is_cut_to_end_together(group: int) -> None:
    pytest.importorskip("triton")
    from sgcd_kernels.triton.launch import shares_of

    config, slots = config_for("pair_stats", 9, 2), 132
    for n, vocab in [(1, 49_152), (100, 248_320), (8192, 151_936), (16_384, 248_320), (1, 5)]:
        cut = shares_of(n, vocab, config, slots, group)
        assert cut.words % config.words == 0 and (cut.count - 1) * cut.words < vocab <= cut.count * cut.words
        assert cut.token_tiles * config.tokens >= n
    cut = shares_of(8192, 151_936, config, slots, group)
    waves = -(-cut.token_tiles * cut.count // slots)
    assert cut.token_tiles * cut.count / (waves * slots) > 0.9  # of the last wave little is idle
    if group >= 7:  # fewer would need more shares than there may be
        assert min(group, cut.token_tiles) * cut.count >= slots  # one group of tokens keeps the device busy


def test_hidden_states_that_run_together_fit_into_the_cache() -> None:
    pytest.importorskip("triton")
    from sgcd_kernels.triton.launch import RESIDENT_BYTES, Head, token_group

    config = config_for("pair_stats", 9, 2)
    for width in (64, 576, 2560, 4096, 8192):
        x = torch.empty(1, width, dtype=torch.bfloat16)
        group = token_group(config, *[Head(x, x, None, torch.bfloat16)] * 2)
        tile = 2 * config.tokens * width * 2
        assert group >= 1 and group * tile <= RESIDENT_BYTES < (group + 1) * tile
