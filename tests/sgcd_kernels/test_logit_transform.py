"""The transform of the logits, against the forward of transformers' own models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sgcd_kernels.models import check_unscaled, logit_transform

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
MODELS: dict[str, tuple[dict[str, Any], float, float | None]] = {  # fields, scale, softcap
    "llama": ({}, 1.0, None),
    "cohere2": ({"logit_scale": 0.25}, 0.25, None),
    "granite": ({"logits_scaling": 4.0}, 0.25, None),
    "hyperclovax": ({"logits_scaling": 4.0}, 4.0, None),
    "falcon_h1": ({"lm_head_multiplier": 0.05, **MAMBA}, 0.05, None),
    "gemma2": ({"final_logit_softcapping": 0.5, "head_dim": 8}, 1.0, 0.5),
    "nanochat": ({"final_logit_softcapping": 0.5}, 1.0, 0.5),
    "recurrent_gemma": ({"logits_soft_cap": 0.5}, 1.0, 0.5),
    "xlstm": ({"output_logit_soft_cap": 0.5, "num_heads": 4, "qk_dim_factor": 1.0, "chunk_size": 8}, 1.0, 0.5),
}


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_what_the_model_does(kind: str) -> None:
    fields, scale, softcap = MODELS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | fields)).float().eval()
    head: Any = model.get_output_embeddings()
    nn.init.normal_(head.weight, std=1.0)
    projected: list[torch.Tensor] = []
    head.register_forward_hook(lambda _, __, out: projected.append(out.detach().clone()))
    with torch.no_grad():
        logits = model(torch.arange(1, 9)[None], use_cache=False).logits
    assert logit_transform(model) == (pytest.approx(scale), softcap)
    want = projected[0] * scale
    if softcap is not None:
        want = softcap * torch.tanh(want / softcap)
    torch.testing.assert_close(logits, want)
    if scale == 1:
        check_unscaled(model)
    else:
        with pytest.raises(ValueError, match=rf"multiplies its logits by {scale:g}, needs 1"):
            check_unscaled(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logits_mup_width_multiplier": 24.0}, "logits_mup_width_multiplier of Model is 24.0, needs 1"),
        ({"output_multiplier_scale": 0.5}, "output_multiplier_scale of Model is 0.5, needs 1"),
        ({"unpadded_vocab_size": 30, "vocab_size": 32}, "the head of Model has 32 rows for 30 vocab ids"),
        ({"model_type": "mpt", "logit_scale": "inv_sqrt_d_model"}, "logit_scale of Model is 'inv_sqrt_d_model'"),
    ],
)
def test_what_is_not_read_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logit_transform(model_with(**fields))


def test_fields_of_other_things_are_let_pass() -> None:
    fields = {"attn_logit_softcapping": 50.0, "moe_router_logit_softcapping": 30.0, "num_logits_to_keep": 7}
    assert logit_transform(model_with(**fields)) == (1, None)
    assert logit_transform(nn.Linear(2, 2)) == (1, None)


def model_with(**fields: Any) -> Any:
    class Model(nn.Module):
        config = SimpleNamespace(**fields)

    return Model()
