"""The plug-ins in the real verl: its registries, its engine, its losses and its data."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from sgcd_kernels import CreditConfig, credit_weights, reference
from sgcd_kernels.integrations.verl import versions

if importlib.util.find_spec("verl") is None:  # an importorskip would also skip what is installed and broken
    pytest.skip("verl is not installed", allow_module_level=True)

from hydra import compose, initialize_config_dir
from tensordict import TensorDict
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from verl.trainer.ppo import core_algos
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import FSDPActorConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from sgcd_kernels.integrations.verl import register
from sgcd_kernels.integrations.verl.alignment import predicting_states, teacher_input_ids
from sgcd_kernels.integrations.verl.credit import credit_config, response_credit
from sgcd_kernels.integrations.verl.engine import SGCDEngine
from sgcd_kernels.integrations.verl.lm_head import patch_lm_head
from sgcd_kernels.integrations.verl.policy_loss import TokenWeights, token_weights
from tests.sgcd_kernels.integrations import verl_host as host

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "verl"
TAU = 0.9  # the temperature of the batch


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("verl")
    with host.cpu_process(folder):
        yield host.save_tiny(folder / "model")


def with_reference(*, first: bool = True) -> torch.Tensor:
    """Teacher ids: every prompt opens with the reference, or only the others' where `first` is false."""
    prompts = [host.REFERENCE + p if first or i else p for i, p in enumerate(host.PROMPTS)]
    return teacher_input_ids(prompts, host.jagged(host.RESPONSES))


def step(engine: Any, data: TensorDict, loss_mode: str) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """(loss, metrics, gradients) of an update of the actor by verl's own loss function, before the optimiser's step."""
    engine.optimizer_zero_grad()
    with engine.train_mode():
        loss_function = partial(ppo_loss, config=host.actor_config(loss_mode))
        output = engine.forward_backward_batch(data, loss_function, forward_only=False)
        grads = [p.grad.full_tensor().clone() for p in engine.module.parameters()]
    return sum(output["loss"]), {name: value.aggregate() for name, value in output["metrics"].items()}, grads


def full_logits(path: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Of each sequence, the logits [R, V] that predict its response, in fp64, by the plain model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
    found = []
    for prompt, response in zip(prompts, host.RESPONSES):
        with torch.no_grad():
            found.append(model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / TAU)
    return found


def test_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "nvidia")
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is SGCDEngine
    for model_type, strategy in (("language_model", "fsdp"), ("value_model", "fsdp2")):  # these stay verl's own
        assert not issubclass(EngineRegistry.get_engine_cls(model_type, strategy), SGCDEngine)
    assert {"sgcd", "sgcd_gspo", "sgcd_cispo"} <= set(register.POLICY_LOSSES)
    assert not any(name.startswith("sgcd_sgcd") for name in register.register_policy_losses())


@pytest.mark.parametrize("packed", [False, True])
def test_without_a_reference_the_engine_is_verls(path: Path, packed: bool) -> None:
    """No teacher, gamma 0, and a teacher without a reference: loss and gradients of verl's own engine and loss."""
    stock = host.engine_of(FSDPEngineWithLMHead, path, packed=packed, fused=False)
    loss, _, grads = step(stock, host.batch(packed=packed, fused=False), "vanilla")
    ours = host.engine_of(SGCDEngine, path, packed=packed)
    off = host.engine_of(SGCDEngine, path, packed=packed, sgcd={"gamma": 0.0})
    same = teacher_input_ids(host.PROMPTS, host.jagged(host.RESPONSES))
    runs = {
        "no teacher": step(ours, host.batch(packed=packed), "vanilla"),
        "gamma 0": step(off, host.batch(packed=packed, teacher=with_reference()), "sgcd"),
        "no reference": step(ours, host.batch(packed=packed, teacher=same), "sgcd"),
    }
    for name, (value, metrics, found) in runs.items():
        assert value == pytest.approx(loss, rel=1e-5), name
        torch.testing.assert_close(found, grads, rtol=1e-4, atol=1e-6)
        assert metrics.get("credit/mean_weight", 1.0) == 1.0, name
    assert runs["no reference"][1]["credit/mean_divergence"] == 0
    assert runs["no reference"][1]["credit/inert"] == 1
    assert runs["gamma 0"][1]["credit/mean_divergence"] > 0.01
    torch.testing.assert_close(runs["no reference"][2], runs["no teacher"][2], rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rule", ["sgcd", "dgpo"])
def test_the_engine_weights_by_the_divergence(path: Path, packed: bool, rule: str) -> None:
    """Its update equals one with advantages that were weighted by hand, from full logits of the plain model."""
    student, teacher = full_logits(path, host.PROMPTS), full_logits(path, [host.REFERENCE + p for p in host.PROMPTS])
    weights = []
    for p, q, mask in zip(student, teacher, host.MASKS):
        entropies = [reference.logprob(z, torch.zeros(len(z), dtype=torch.long))[1] for z in (p, q)]
        turns = (torch.tensor([0, *mask]).diff() == 1).long().cumsum(0)
        credit = credit_weights(
            reference.kl(p, q),
            entropies[1],
            torch.tensor([0, len(p)]),
            mask=torch.tensor(mask),
            turn_ids=turns,
            bhattacharyya=reference.bhattacharyya(p, q),
            student_entropy=entropies[0],
            config=CreditConfig(rule=rule),
        )
        weights.append(credit.weights.float())
    by_hand = host.batch(packed=packed)
    by_hand["advantages"] = host.jagged([a * w for a, w in zip(by_hand["advantages"].unbind(), weights)], torch.float32)
    engine = host.engine_of(SGCDEngine, path, packed=packed, sgcd={"rule": rule})
    want = step(engine, by_hand, "vanilla")
    got = step(engine, host.batch(packed=packed, teacher=with_reference()), "sgcd")
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-6)
    counted = torch.cat([w[torch.tensor(m) != 0] for w, m in zip(weights, host.MASKS)])
    assert got[1]["credit/mean_weight"] == pytest.approx(float(counted.mean()), rel=1e-4)
    assert float(counted.std()) > 0.05, "the weights are all alike: the test would prove nothing"


def test_a_sequence_without_a_reference_keeps_its_advantage(path: Path) -> None:
    engine = host.engine_of(SGCDEngine, path, packed=False)
    everything = step(engine, host.batch(packed=False, teacher=with_reference()), "sgcd")
    but_one = step(engine, host.batch(packed=False, teacher=with_reference(first=False)), "sgcd")
    assert 1 < but_one[1]["credit/mean_weight"] < everything[1]["credit/mean_weight"]


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_of_one_give_what_one_of_all_gives(
    path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As examples/verl/sgcd.yaml cuts them."""
    engine = host.engine_of(SGCDEngine, path, packed=packed)
    options = {"packed": packed, "teacher": with_reference()}
    whole = step(engine, host.batch(**options), "sgcd")
    steps: list[int] = []
    taken = engine.forward_step
    monkeypatch.setattr(
        engine, "forward_step", lambda part, *rest, **named: steps.append(len(part)) or taken(part, *rest, **named)
    )
    cut = step(engine, host.batch(**options, micro_batch_size_per_gpu=1), "sgcd")
    assert steps == [1, 1, 1]
    torch.testing.assert_close(cut[2], whole[2], rtol=1e-4, atol=1e-6)
    assert whole[1]["credit/mean_weight"] > 1


def test_a_forward_only_pass_gives_the_divergence(path: Path) -> None:
    engine = host.engine_of(SGCDEngine, path, packed=True)
    options = {"packed": True, "teacher": with_reference()}
    with engine.eval_mode():
        output = engine.forward_backward_batch(
            host.batch(**options, calculate_divergence=True), None, forward_only=True
        )
        silent = engine.forward_backward_batch(host.batch(**options), None, forward_only=True)
    assert set(silent["model_output"]) == {"log_probs", "entropy"}
    found = output["model_output"]
    student, teacher = full_logits(path, host.PROMPTS), full_logits(path, [host.REFERENCE + p for p in host.PROMPTS])
    for i, (prompt, response) in enumerate(zip(host.PROMPTS, host.RESPONSES)):
        places, words = slice(len(prompt) - 1, len(prompt) + len(response) - 1), torch.tensor(response)
        p, q = reference.logprob(student[i], words), reference.logprob(teacher[i], words)
        want = {
            "log_probs": p[0],
            "entropy": p[1],
            "reverse_kl": reference.kl(student[i], teacher[i]),
            "forward_kl": reference.kl(teacher[i], student[i]),
            "bhattacharyya": reference.bhattacharyya(student[i], teacher[i]),
            "teacher_logp": q[0],
            "teacher_entropy": q[1],
        }
        for name, values in want.items():
            torch.testing.assert_close(found[name][i][places], values.float(), rtol=1e-4, atol=1e-5, msg=name)
        assert (found["reverse_kl"][i][: len(prompt) - 1] == 0).all()


def loss_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    old, new, advantages = (torch.randn(2, 5, generator=generator) * scale for scale in (0.5, 0.5, 1.0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return {"old_log_prob": old - 3, "log_prob": new - 3, "advantages": advantages, "response_mask": mask}


OWN_LOSSES = sorted(set(core_algos.POLICY_LOSS_REGISTRY) - set(register.POLICY_LOSSES) - {"bypass_mode", "geo_mean"})


@pytest.mark.parametrize("mode", OWN_LOSSES)
def test_every_policy_loss_has_a_weighted_version(mode: str) -> None:
    """W = 1 gives verl's bits; other W what verl gives for weighted advantages."""
    own, twin = (core_algos.get_policy_loss_fn(x) for x in (mode, "sgcd" if mode == "vanilla" else f"sgcd_{mode}"))
    inputs, config = loss_inputs(), host.actor_config(mode)
    weights = torch.linspace(1, 2, 10).reshape(2, 5)
    for w in (torch.ones(2, 5), weights):
        torch.manual_seed(0)  # clip_cov draws which tokens it clips
        want, metrics = own(**inputs | {"advantages": inputs["advantages"] * w}, config=config)
        torch.manual_seed(0)
        with token_weights(TokenWeights(w, {"credit/mean_weight": 1.5})):
            got, more = twin(**inputs, config=config)
        assert torch.equal(got, want)
        assert more == metrics | {"credit/mean_weight": 1.5}
    plain, _ = own(**inputs, config=config)
    assert not torch.equal(plain, want) or mode == "gpg"


@pytest.mark.parametrize("name", sorted(set(register.POLICY_LOSSES) - {"sgcd_bypass_mode"}))
def test_it_matters_which_token_has_the_weight(name: str) -> None:
    """Of every registered twin: the same weights on other tokens give another gradient."""
    advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 5)
    inputs = loss_inputs() | {"advantages": advantages, "response_mask": torch.ones(2, 5)}
    weights = torch.tensor([[2.0, 1, 1, 1, 1], [1, 1, 2.0, 1, 1]])
    gradients = []
    for w in (weights, weights.roll(1, 1)):
        log_prob = inputs["log_prob"].clone().requires_grad_()
        torch.manual_seed(0)  # clip_cov draws which tokens it clips
        with token_weights(TokenWeights(w, {})):
            loss, _ = core_algos.get_policy_loss_fn(name)(
                **inputs | {"log_prob": log_prob}, config=host.actor_config(name)
            )
        gradients.append(torch.autograd.grad(loss, log_prob)[0])
    assert (gradients[0] - gradients[1]).abs().max() > 0.05


def test_a_loss_of_the_mean_advantage_has_no_weighted_version() -> None:
    assert "geo_mean" in core_algos.POLICY_LOSS_REGISTRY
    with pytest.raises(ValueError, match="Unsupported loss mode: sgcd_geo_mean"):
        core_algos.get_policy_loss_fn("sgcd_geo_mean")


def test_a_policy_loss_without_weights_refuses() -> None:
    loss, config = core_algos.get_policy_loss_fn("sgcd"), host.actor_config("sgcd")
    with pytest.raises(ValueError, match=r"no token weights, needs our engine .* and teacher_input_ids in the batch"):
        loss(**loss_inputs(), config=config)
    with (
        token_weights(TokenWeights(torch.ones(2, 4), {})),
        pytest.raises(ValueError, match=r"have shape \[2, 4\], need \[2, 5\]"),
    ):
        loss(**loss_inputs(), config=config)
    with pytest.raises(ValueError, match="no token weights"):  # they are not left behind
        loss(**loss_inputs(), config=config)


def test_response_credit_is_credit_weights_on_each_response() -> None:
    generator = torch.Generator().manual_seed(0)
    d, h = torch.rand(3, 7, generator=generator), torch.rand(3, 7, generator=generator)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]])
    got = response_credit({"reverse_kl": d, "teacher_entropy": h}, mask)
    for i in range(3):
        n = int(mask[i].nonzero().max()) + 1  # of one response alone, without its padding
        turns = (mask[i, :n] == 0).cumsum(0)
        want = credit_weights(d[i, :n], h[i, :n], torch.tensor([0, n]), mask=mask[i, :n], turn_ids=turns)
        assert torch.equal(got.weights[i, :n], want.weights)
        assert torch.equal(got.saliency[i, :n], want.saliency)
        assert (got.weights[i, n:] == 1).all()
    assert 1 < got.weights.mean() < 2


def test_predicting_states() -> None:
    lengths, responses = torch.tensor([5, 3]), torch.tensor([2, 1])
    assert predicting_states(lengths, responses, None).tolist() == [2, 3, 6]
    assert predicting_states(lengths, responses, 5).tolist() == [2, 3, 6]
    assert predicting_states(lengths, responses, 9).tolist() == [2, 3, 10]
    with pytest.raises(ValueError, match="sequence 1 has 3 tokens for a response of 3, needs a prompt"):
        predicting_states(lengths, torch.tensor([2, 3]), None)


def test_refusals_when_the_engine_is_made(path: Path) -> None:
    with pytest.raises(ValueError, match="use_fused_kernels is False, needs True"):
        host.engine_of(SGCDEngine, path, packed=True, fused=False)
    with pytest.raises(ValueError, match=r"sgcd is 'gama', needs one of .* did you mean 'gamma'"):
        host.engine_of(SGCDEngine, path, packed=True, sgcd={"gama": 1.0})
    with pytest.raises(ValueError, match=r"clip is 0\.5"):
        credit_config({"clip": 0.5})
    with pytest.raises(ValueError, match="packed is True, needs False for LlamaForCausalLM: its linear_attention"):
        host.engine_of(SGCDEngine, path, packed=True, hf={"layer_types": ["full_attention", "linear_attention"]})


@pytest.mark.parametrize("kind", ["a softcap", "a scale"])
def test_the_head_knows_a_models_own_transform(kind: str) -> None:
    """RecurrentGemma caps its logits under a name of its own; FalconH1 scales them under another."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    if kind == "a softcap":
        model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, logits_soft_cap=0.5)).eval()
    else:
        mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
        config = FalconH1Config(**sizes, **mamba, num_key_value_heads=2, lm_head_multiplier=0.05)
        model = FalconH1ForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    ids = torch.arange(1, 9)[None]
    logits = model(ids, use_cache=False).logits / 0.7
    want = logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    patch_lm_head(model)
    found = model(ids, use_cache=False, temperature=0.7).log_probs[0, :-1]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_teacher_ids_must_hold_the_response(path: Path) -> None:
    engine = host.engine_of(SGCDEngine, path, packed=True)
    other = [[3, *response[1:]] for response in host.RESPONSES]
    wrong = teacher_input_ids(host.PROMPTS, host.jagged(other))
    with pytest.raises(ValueError, match="teacher_input_ids of sequence 0 does not end as input_ids"):
        step(engine, host.batch(packed=True, teacher=wrong), "sgcd")
    with pytest.raises(ValueError, match="prompts has 2 entries, needs 3"):
        teacher_input_ids(host.PROMPTS[:2], host.jagged(host.RESPONSES))


def test_the_example_config_is_verls_with_credit(path: Path) -> None:
    """It composes with verl's own files into verl's own dataclasses, and an engine and a loss come of it."""
    with initialize_config_dir(str(EXAMPLES), version_base=None):
        config = compose("sgcd", [f"actor_rollout_ref.model.path={path}"]).actor_rollout_ref
    actor = omega_conf_to_dataclass(config.actor)
    assert isinstance(actor, FSDPActorConfig) and actor.engine.strategy == "fsdp2"
    assert actor.policy_loss.loss_mode in register.POLICY_LOSSES
    assert config.model.external_lib == register.__name__ and config.model.use_fused_kernels
    credit = credit_config(config.model.fused_kernel_options.sgcd)
    assert credit == CreditConfig(gamma=1.0, clip=2.0)


@pytest.mark.parametrize("found", ["0.8.0", None])
def test_other_versions_are_refused(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise versions.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(ImportError, match=r"verl is (0.8.0|not installed), needs 0.9.0 or 0.9.1"):
        versions.check_version()


def shard_worker(rank: int, folder: str) -> None:
    """Both ranks train on the same batch, so that their mean gradient is that of one process."""
    path = Path(folder)
    with host.cpu_process(path, rank, 2):
        engine = host.engine_of(SGCDEngine, path / "model", packed=True)
        loss, _, grads = step(engine, host.batch(packed=True, teacher=with_reference()), "sgcd")
        assert all(len(p.to_local()) < len(p) for p in engine.module.parameters() if p.dim() == 2), "nothing is sharded"
        if rank == 0:
            torch.save((loss, grads), path / "sharded.pt")


@pytest.mark.slow
def test_two_processes_equal_one(path: Path) -> None:
    engine = host.engine_of(SGCDEngine, path, packed=True)
    loss, _, grads = step(engine, host.batch(packed=True, teacher=with_reference()), "sgcd")
    folder = path.parent / "two"
    folder.mkdir()
    host.save_tiny(folder / "model")
    mp.spawn(shard_worker, args=(str(folder),), nprocs=2)
    got, found = torch.load(folder / "sharded.pt")
    assert got == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found, grads, rtol=1e-4, atol=1e-6)
