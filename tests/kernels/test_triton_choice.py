"""When the Triton backend is chosen, refused, and configured; none of it compiles or runs a kernel."""

from __future__ import annotations

import pytest
import torch

from sgcd_kernels import linear_logprob
from sgcd_kernels.backends import resolve
from sgcd_kernels.triton import availability
from sgcd_kernels.triton.configs import HALF, SINGLE, config_for
from sgcd_kernels.types import Projection

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
@pytest.mark.parametrize("operand_bytes", [2, 4])
def test_every_capability_has_a_configuration(kernel: str, operand_bytes: int) -> None:
    table = (HALF if operand_bytes == 2 else SINGLE)[kernel]
    assert config_for(kernel, 8, operand_bytes) == table[8][0]
    assert config_for(kernel, 12, operand_bytes) == table[10][0]


def test_work_is_cut_to_end_together() -> None:
    pytest.importorskip("triton")
    from sgcd_kernels.triton.launch import shares_of

    config = config_for("pair_stats", 9, 2)
    for n, vocab in [(1, 49_152), (100, 248_320), (8192, 151_936), (16_384, 248_320), (1, 5)]:
        cut = shares_of(n, vocab, config, 264)
        assert cut.words % config.words == 0 and (cut.count - 1) * cut.words < vocab <= cut.count * cut.words
        assert cut.token_tiles * config.tokens >= n
    cut = shares_of(8192, 151_936, config, 264)
    waves = -(-cut.token_tiles * cut.count // 264)
    assert cut.token_tiles * cut.count / (waves * 264) > 0.9  # of the last wave little is idle
