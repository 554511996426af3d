"""The measured head, against the forward of transformers' own models and of models made to deceive it."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sgcd_kernels import linear_divergence, linear_logprob, output_head

V, H = 32, 32
SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "num_local_experts": 2,
    "num_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
}
OTHER_NAMES = {
    **dict.fromkeys(("d_model", "n_embd", "ffn_dim", "embedding_size", "word_embed_proj_dim", "dim", "emb_dim"), H),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), H),
    **dict.fromkeys(("n_layer", "n_layers", "encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    "is_decoder": True,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
MODELS: dict[str, tuple[dict[str, Any], float, float | None]] = {  # fields, scale, softcap
    "llama": ({}, 1.0, None),
    "cohere": ({"logit_scale": 0.3}, 0.3, None),
    "cohere2": ({"logit_scale": 0.25}, 0.25, None),
    "granite": ({"logits_scaling": 8.0}, 0.125, None),
    "hyperclovax": ({"logits_scaling": 4.0}, 4.0, None),
    "falcon_h1": ({"lm_head_multiplier": 0.05, **MAMBA}, 0.05, None),
    "minicpm3": ({"dim_model_base": 8, "num_key_value_heads": 4}, 0.25, None),
    "gemma2": ({"final_logit_softcapping": 0.5, "head_dim": 8}, 1.0, 0.5),
    "nanochat": ({"final_logit_softcapping": 0.5}, 1.0, 0.5),
    "recurrent_gemma": ({"logits_soft_cap": 0.5}, 1.0, 0.5),
    "xlstm": ({"output_logit_soft_cap": 0.5, "num_heads": 4, "qk_dim_factor": 1.0, "chunk_size": 8}, 1.0, 0.5),
}


def causal_lm(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES | fields)
    made = AutoModelForCausalLM.from_config(config).float().eval()
    nn.init.normal_(made.get_output_embeddings().weight)
    return made


def log_probs(model: Any, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Of the next tokens: by `linear_logprob`, and by the model's own logits."""
    ids = torch.arange(1, 9)[None]
    head = output_head(model)
    with torch.no_grad():
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(ids, use_cache=False).logits
    found = linear_logprob(states[0], head.weight, ids[0].roll(-1), **head.options(temperature)).logp
    torch.testing.assert_close(head.logits(states), logits)
    want = (logits.float() / temperature).log_softmax(-1)[0].gather(-1, ids[0].roll(-1)[:, None])[:, 0]
    return found.detach(), want


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_are_the_models_own(kind: str, temperature: float) -> None:
    fields, scale, softcap = MODELS[kind]
    model = causal_lm(kind, **fields)
    head = output_head(model)
    assert (head.scale, head.softcap) == (pytest.approx(scale, rel=1e-6), softcap)
    torch.testing.assert_close(*log_probs(model, temperature))


def tiny(kind: str) -> Any:
    """A small model of that kind, or one on the meta device where its defaults stay large. None if neither is made."""
    try:
        config = CONFIG_MAPPING[kind](**SIZES)
        text = config.get_text_config()
        for name, value in {**SIZES, **OTHER_NAMES}.items():
            if hasattr(text, name):
                setattr(text, name, value)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if sum(p.numel() for p in model.parameters()) < 2_000_000:
            model = AutoModelForCausalLM.from_config(config).float().eval()
    except Exception:  # a config that needs more than sizes
        return None
    return model


# Layers between decoder and head, or no submodule that ends in hidden states.
REFUSED = set(
    """bert big_bird camembert data2vec-text electra ernie llama4 llama4_text megatron-bert mllama modernbert-decoder
    rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod gemma3 gemma4""".split()
)


def outcomes(kinds: list[str]) -> tuple[set[str], set[str]]:
    """(reproduced: `output_head` has compared all logits; refused). Kinds that cannot be made here are in neither."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    reproduced, refused = set(), set()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind in kinds:
                if (model := tiny(kind)) is None:
                    continue
                try:
                    output_head(model)
                    reproduced.add(kind)
                except ValueError:
                    refused.add(kind)
    finally:
        transformers.logging.set_verbosity(verbosity)
    return reproduced, refused


@pytest.mark.slow
def test_every_causal_lm_of_transformers() -> None:
    reproduced, refused = outcomes(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    assert len(reproduced) > 135 and refused <= REFUSED


def test_causal_lms_with_and_without_layers_before_the_head() -> None:
    with_layers = ["bert", "camembert", "electra", "roformer", "xmod"]
    plain = ["bloom", "codegen", "gpt2", "gpt_neox", "gptj", "opt", "phi", "qwen3", "smollm3", "starcoder2"]
    assert outcomes([*with_layers, *plain]) == (set(plain), set(with_layers))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor) -> Any:
        raise AssertionError("the decoder must not run")


class Model(nn.Module):
    """A causal LM that does what `after` says between its head's product and its logits, `before` before it."""

    def __init__(self, *, bias: bool = False, before: Any = None, after: Any = None, **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder, self.lm_head = Decoder(), nn.Linear(H, V, bias=bias)
        self.before, self.after = before or (lambda h, m: h), after or (lambda z, m: z)
        for name, part in parts.items():
            self.add_module(name, part)

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def get_decoder(self) -> Any:
        return self.decoder

    def forward(self, input_ids: Tensor) -> Any:
        states = self.decoder(input_ids)[0]
        return (self.after(self.lm_head(self.before(states, self)), self),)


def cap(z: Tensor, c: float) -> Tensor:
    return c * torch.tanh(z / c)


REPRODUCED: dict[str, tuple[dict[str, Any], tuple[float, float | None, float]]] = {  # scale, softcap, bias_scale
    "plain": ({}, (1.0, None, 1.0)),
    "a bias": ({"bias": True}, (1.0, None, 1.0)),
    "mup_output_alpha": ({"before": lambda h, m: h * 0.37}, (0.37, None, 1.0)),
    "scaled before a bias": ({"before": lambda h, m: h * 8, "bias": True}, (8.0, None, 1.0)),
    "scaled after a bias": ({"after": lambda z, m: z / 8, "bias": True}, (0.125, None, 0.125)),
    "width_scale": ({"after": lambda z, m: z / math.sqrt(H)}, (1 / math.sqrt(H), None, 1.0)),
    "scale by the width it sees": ({"before": lambda h, m: h * h.shape[-1] ** -0.5}, (H**-0.5, None, 1.0)),
    "scale, then cap": ({"after": lambda z, m: cap(z * 0.2, 15.0), "bias": True}, (0.2, 15.0, 0.2)),
    "cap, then scale": ({"after": lambda z, m: cap(z, 15.0) * 0.2}, (0.2, 3.0, 1.0)),
    "a narrow cap": ({"after": lambda z, m: cap(z, 0.01)}, (1.0, 0.01, 1.0)),
    "a wide cap": ({"after": lambda z, m: cap(z, 5000.0)}, (1.0, 5000.0, 1.0)),
    "a small scale under a cap": ({"after": lambda z, m: cap(z * 1e-3, 50.0)}, (1e-3, 50.0, 1.0)),
    "logits in fp32": ({"after": lambda z, m: z.float() / 3}, (1 / 3, None, 1.0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", REPRODUCED)
def test_transforms_of_any_name(name: str, dtype: torch.dtype) -> None:
    options, (scale, softcap, bias_scale) = REPRODUCED[name]
    model = Model(**options).to(dtype)
    head = output_head(model)
    assert (head.scale, head.bias_scale) == (pytest.approx(scale, rel=1e-6), pytest.approx(bias_scale, rel=1e-6))
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    hidden = torch.randn(6, H, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(dtype) * 20
    model = model.float()
    z = model.after(model.lm_head(model.before(hidden.float(), model)), model).detach()
    found = linear_logprob(hidden.float(), head.weight, torch.arange(6), **head.options(0.7)).logp.detach()
    torch.testing.assert_close(found, (z / 0.7).log_softmax(-1)[torch.arange(6), torch.arange(6)])


def test_the_documented_line_gives_exact_divergences() -> None:
    model = Model(bias=True, after=lambda z, m: cap(z / 8, 2.0))
    head, ids = output_head(model), torch.arange(5)
    student, teacher = torch.randn(2, 5, H) * 10
    found = linear_divergence(student, head.weight, ids, teacher, **head.options(0.9)).reverse_kl
    p, q = ((model.after(model.lm_head(x), model) / 0.9).log_softmax(-1) for x in (student, teacher))
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1).detach())


class NormHead(nn.Linear):
    """Baichuan's: rows of unit norm."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)


def masked(z: Tensor, m: Any) -> Tensor:
    return z.index_fill(-1, torch.tensor([V - 1]), torch.finfo(z.dtype).min)


REFUSALS: dict[str, tuple[Any, str]] = {
    "a layer before it": (
        lambda: Model(before=lambda h, m: m.dense(h.to(m.dense.weight.dtype)), dense=nn.Linear(H, H)),
        r"between them runs dense \(Linear\)",
    ),
    "a norm before it": (lambda: Model(before=lambda h, m: h / (1 + h.norm(dim=-1, keepdim=True))), "its logits"),
    "a norm layer before it": (lambda: Model(before=lambda h, m: m.norm(h), norm=nn.RMSNorm(H)), r"norm \(RMSNorm\)"),
    "a normalised weight": (lambda: replaced(NormHead(H, V, bias=False)), "its logits differ"),
    "another bias": (lambda: Model(after=lambda z, m: z + 0.3), "at hidden states of 0 they are not the layer's bias"),
    "a masked id": (lambda: Model(after=masked), "its logits differ"),
    "missing ids": (lambda: Model(after=lambda z, m: z[..., : V - 2]), r"it gives logits \[1, \d, 30\]"),
    "a clamp": (lambda: Model(after=lambda z, m: z.clamp(-30, 30)), "its logits differ"),
    "a sigmoid cap": (lambda: Model(after=lambda z, m: 30 * torch.sigmoid(z / 7.5)), "its logits differ"),
    "a negative scale": (lambda: Model(after=lambda z, m: -z), "a scale of -1, needs one above 0"),
    "a scale of 0": (lambda: Model(after=lambda z, m: z * 0), "a scale of 0"),
    "log-probs": (lambda: Model(after=lambda z, m: z.log_softmax(-1)), "its logits differ"),
    "a scale per token": (
        lambda: Model(after=lambda z, m: z * torch.arange(1, z.shape[1] + 1)[None, :, None]),
        "its logits differ",
    ),
    "a forward that fails": (lambda: Model(after=lambda z, m: 1 / 0), "its forward cannot be run"),
    "a forward without logits": (lambda: Model(after=lambda z, m: None), "its forward cannot be run"),
    "nan": (lambda: broken(), "its logits differ by up to inf"),
}


def replaced(head: nn.Module) -> Model:
    model = Model()
    model.lm_head = head  # type: ignore[assignment]
    return model


def broken() -> Model:
    model = Model()
    model.lm_head.weight.data[3, 3] = math.nan
    return model


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_reproduced_is_refused(name: str) -> None:
    made, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        output_head(made())


def test_nothing_of_the_model_changes() -> None:
    model = causal_lm("gemma2", head_dim=8, attention_dropout=0.1).train()
    model.get_decoder().register_forward_hook(lambda *_: pytest.fail("a hook of the decoder ran"))
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    parameters, kinds = list(map(id, model.parameters())), [type(m) for m in model.modules()]
    state = torch.get_rng_state()
    output_head(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes and list(map(id, model.parameters())) == parameters
    assert [type(m) for m in model.modules()] == kinds and torch.is_grad_enabled()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    failing = Model(after=lambda z, m: 1 / 0)
    weight = failing.lm_head.weight
    with pytest.raises(ValueError, match="cannot be run"):
        output_head(failing)
    assert failing.lm_head.weight is weight and type(failing.decoder) is Decoder


def test_wrappers_tied_weights_zeros_and_meta() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    granite = causal_lm("granite", logits_scaling=8.0, tie_word_embeddings=True)
    adapted = peft.get_peft_model(granite, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert output_head(adapted).scale == 0.125
    assert output_head(torch.compile(granite)).scale == 0.125  # type: ignore[arg-type]
    assert output_head(granite).weight is granite.get_input_embeddings().weight
    zero = Model(after=lambda z, m: cap(z / 4, 3.0))
    nn.init.zeros_(zero.lm_head.weight)
    assert (output_head(zero).scale, output_head(zero).softcap) == (0.25, 3.0)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(granite.config)
    assert output_head(meta).scale == 0.125
    with torch.device("meta"):
        meta = Model(after=lambda z, m: z[..., :30])
    with pytest.raises(ValueError, match=r"it gives logits \[1, \d, 30\]"):
        output_head(meta)


def test_hooks_of_the_model_count_and_virtual_tokens_are_refused() -> None:
    halved = Model()
    halved.register_forward_hook(lambda module, given, out: (out[0] / 2,))
    assert output_head(halved).scale == 0.5
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for kind, name in ((peft.PromptTuningConfig, "PROMPT_TUNING"), (peft.PrefixTuningConfig, "PREFIX_TUNING")):
        adapted = peft.get_peft_model(causal_lm("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
        with pytest.raises(ValueError, match=f"model has a {name} adapter, needs one within its decoder"):
            output_head(adapted)


def test_the_bundle_reads_parameters_that_were_replaced() -> None:
    model = Model(bias=True)
    head = output_head(model)
    model.lm_head.weight = nn.Parameter(torch.ones(V, H))
    assert head.weight is model.lm_head.weight and head.options()["bias"] is model.lm_head.bias
