"""Supervised fine-tuning: micro-batches and autocast."""

from __future__ import annotations

import pytest
import torch

from sgcd_kernels import output_head
from tests.trainer.byte_policy import tiny_model
from trainer.learning.model import compute_in_bf16
from trainer.learning.sft import Example, microbatches, sft_loss


def test_microbatches_give_the_gradient_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = []
    for length in (5, 9, 12, 12, 30):
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        batch.append(Example(ids, [i > length // 2 for i in range(length)]))
    model = tiny_model()
    sft_loss(model, output_head(model), batch, 0).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = sum(sum(e.loss_mask) for e in batch)
    parts = microbatches(batch, 26)
    assert [len(part) for part in parts] == [2, 2, 1]
    for part in parts:
        (sft_loss(model, output_head(model), part, 0) * (sum(sum(e.loss_mask) for e in part) / total)).backward()
    for ours, theirs in zip([p.grad for p in model.parameters()], expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert microbatches(batch, None) == [batch]


def test_autocast_computes_in_bf16_and_keeps_fp32_weights() -> None:
    model, ids = tiny_model(), torch.arange(3, 40)[None]
    plain = model.get_decoder()(input_ids=ids).last_hidden_state
    compute_in_bf16(model.get_decoder())
    rough = model.get_decoder()(input_ids=ids).last_hidden_state
    rough.sum().backward()
    assert 0 < (rough - plain).abs().max() < 0.1
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="input_ids"):
        model.get_decoder()()
    assert not torch.is_autocast_enabled("cpu")  # left even when the forward fails
