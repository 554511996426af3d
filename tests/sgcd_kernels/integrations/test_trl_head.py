"""LinearHead against the logits of the model that it is put on."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (it needs Python 3.11)")
pytest.importorskip("datasets", reason="datasets is not installed")

from transformers import RecurrentGemmaConfig

from sgcd_kernels.integrations.trl.head import LinearHead
from tests.sgcd_kernels.integrations import trl_world as world


def test_a_softcap_by_another_name_than_gemmas() -> None:
    """RecurrentGemma's, which TRL's own fused head does not read."""
    model = world.model(RecurrentGemmaConfig, logits_soft_cap=0.5, lru_width=32).eval()
    ids, temperature = torch.arange(6, 14)[None], 0.7
    table = (model(ids, use_cache=False).logits / temperature).log_softmax(-1)[:, :-1]
    LinearHead(model, temperature)
    found = model(ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, table.gather(-1, ids[:, 1:, None])[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.entropy, -(table.exp() * table).sum(-1), rtol=1e-4, atol=1e-5)
