"""What cannot work is refused before the first step, with the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from sgcd_kernels import CreditConfig, FusedLinearSGCDLoss, backend_status, check_model, linear_logprob

GROUP: Any = object()  # check_model looks only at whether there is one


def causal_lm(name: str, **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{name}TextConfig" if name == "Qwen3_5" else f"{name}Config")(
        **sizes | heads | changes
    )
    made: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return made


def test_plain_models_pass() -> None:
    check_model(causal_lm("Llama"), packed=True, group=GROUP)
    check_model(causal_lm("Llama", tie_word_embeddings=True), packed=True)
    check_model(causal_lm("Qwen3").bfloat16(), packed=True)


@pytest.mark.parametrize("name", ["Qwen3_5", "Mamba"])
def test_packing_with_a_recurrent_model(name: str) -> None:
    hybrid = {"layer_types": ["linear_attention", "full_attention"]} if name == "Qwen3_5" else {}
    model = causal_lm(name, **hybrid)
    check_model(model, packed=False)
    with pytest.raises(ValueError, match=f"packed is True, needs False for {name}ForCausalLM: its .* carry a state"):
        check_model(model, packed=True)


def test_tied_embeddings_under_vocab_parallel() -> None:
    model = causal_lm("Llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="group is given, needs untied embeddings: LlamaForCausalLM has one matrix"):
        check_model(model, group=GROUP)


def with_adapter(**options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(causal_lm("Llama", tie_word_embeddings=False), peft.LoraConfig(r=4, **options))


def test_an_adapter_on_the_head_would_be_left_out() -> None:
    with pytest.raises(
        ValueError, match="the head has an adapter on it, needs none: its own weight is only the frozen part"
    ):
        check_model(with_adapter(target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"lm_head": [1, 2]}}]
)
def test_adapters_that_the_heads_weight_shows(options: dict[str, Any]) -> None:
    """Log-probs of the weight that passes are the model's own, after the adapter was moved."""
    torch.manual_seed(2)  # of a head of few rows, whose largest logits vary by as much as a softcap would show
    model = with_adapter(target_modules=["q_proj"], init_lora_weights=False, **options)
    check_model(model)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    ids = torch.arange(8)[None]
    states, head = model.get_decoder()(ids).last_hidden_state, model.get_output_embeddings()
    found = linear_logprob(states, head.weight, ids.roll(-1)).logp
    want = model(ids).logits.log_softmax(-1).gather(-1, ids.roll(-1).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    ("name", "changes"), [("Cohere", {"logit_scale": 0.0625}), ("Granite", {"logits_scaling": 8.0})]
)
def test_scaled_logits_pass(name: str, changes: dict[str, Any]) -> None:
    check_model(causal_lm(name, **changes), packed=True)


def test_a_softcap_passes() -> None:
    check_model(causal_lm("Gemma2", final_logit_softcapping=3.0), packed=True)


class Int8Params(nn.Parameter):
    """A weight as in bitsandbytes: a subclass of Parameter."""


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            nn.Parameter(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False),
            "is torch.uint8, needs a float dtype",
        ),
        (
            nn.Parameter(torch.zeros(32, 16).to(torch.float8_e4m3fn), requires_grad=False),
            "is torch.float8_e4m3fn, needs",
        ),
        (Int8Params(torch.zeros(32, 16)), "is a Int8Params, needs a plain tensor: keep the head unquantised"),
    ],
)
def test_quantised_heads(weight: nn.Parameter, message: str) -> None:
    model: Any = causal_lm("Llama")
    model.lm_head.weight = weight
    with pytest.raises(ValueError, match=re.escape(message)):
        check_model(model)


class QuantLinear(nn.Module):
    """How GPTQ and AWQ keep a layer: packed integers, and no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 32, dtype=torch.int32))


def test_a_head_without_a_weight() -> None:
    model: Any = causal_lm("Llama")
    model.lm_head = QuantLinear()
    with pytest.raises(ValueError, match="the head is a QuantLinear, needs a plain weight tensor: keep the head unqu"):
        check_model(model)


def test_quantised_weights_at_a_call() -> None:
    weight = torch.zeros(9, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"weight is torch.uint8, .*; what is quantised must be dequantised"):
        linear_logprob(torch.randn(6, 4), weight, torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize(
    ("message", "hyperparameters"),
    [
        ("hyperparameter is 'losstype', needs one of", {"losstype": "grpo"}),
        ("loss_type is 'drgrpo'", {"loss_type": "drgrpo"}),
        ("config is {'gamma': 1.0} (dict), needs a CreditConfig", {"config": {"gamma": 1.0}}),
        ("epsilon_high is -0.1", {"epsilon_high": -0.1}),
        ("beta is nan", {"beta": float("nan")}),
        ("temperature is 0.0", {"temperature": 0.0}),
        ("softcap is -1.0", {"softcap": -1.0}),
        ("ignore_index is 1.5", {"ignore_index": 1.5}),
        ("impl is 'trition', needs one of auto, triton, cpp, torch; did you mean 'triton'", {"impl": "trition"}),
        ("group is 'world', needs a torch.distributed.ProcessGroup or None", {"group": "world"}),
        ("reuse_lse is 'yes', needs True or False", {"reuse_lse": "yes"}),
    ],
)
def test_the_module_refuses_when_it_is_made(message: str, hyperparameters: dict) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FusedLinearSGCDLoss(**hyperparameters)


@pytest.mark.parametrize("impl", ["triton", "cpp"])
def test_the_module_names_a_backend_that_cannot_run(impl: str) -> None:
    status = backend_status()[impl]
    if status.usable:
        FusedLinearSGCDLoss(impl=impl)
        return
    with pytest.raises(ValueError, match=re.escape(f"impl is {impl!r}, which cannot run here: {status.reason}")):
        FusedLinearSGCDLoss(impl=impl)


def test_the_module_shows_what_it_was_made_with() -> None:
    shown = repr(FusedLinearSGCDLoss(config=CreditConfig(gamma=0.5), loss_type="dapo"))
    assert "gamma=0.5" in shown and "loss_type=dapo" in shown and "epsilon=0.2" in shown
