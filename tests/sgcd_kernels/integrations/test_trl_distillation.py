"""TRL's distillation trainers with and without `linear_distillation`: losses, metrics and weights step by step."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (it needs Python 3.11)")
pytest.importorskip("datasets", reason="datasets is not installed")

from peft import LoraConfig
from transformers import Gemma2Config
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from sgcd_kernels.integrations.trl import linear_distillation
from tests.sgcd_kernels.backends.cases import has_body, run_body
from tests.sgcd_kernels.integrations import trl_world as world
from tests.sgcd_kernels.integrations.trl_world import quick_collection  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
SPOKEN = [
    {"messages": [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": f"w{i + 9} w2 w3"}]}
    for i in range(8)
]
PRIVILEGED = [{"prompt": f"w{i} w{i + 1}", "privileged_context": f"w{i + 9} w{i + 10}"} for i in range(8)]
FAMILIES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "GKD": (GKDTrainer, GKDConfig, SPOKEN, {"lmbda": 0.0, "max_new_tokens": 6}),
    "GOLD": (GOLDTrainer, GOLDConfig, SPOKEN, {"lmbda": 0.0, "max_completion_length": 6}),
    "SDPO": (
        SDPOTrainer,
        SDPOConfig,
        PRIVILEGED,
        {"success_reward_threshold": 0.5, "teacher_model_kind": "live", "distillation_mode": "full_logits"},
    ),
    "SDFT": (SDFTTrainer, SDFTConfig, PRIVILEGED, {"teacher_model_kind": "live", "distillation_mode": "full_logits"}),
    "Distillation": (DistillationTrainer, DistillationConfig, PRIVILEGED, {}),
}
TAUGHT = ("GKD", "GOLD", "Distillation")  # by a model of its own
STALE = {"steps_per_generation": 4}
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("GKD", {"beta": beta}) for beta in (0.0, 0.3, 1.0)),
    ("GKD", {"lmbda": 1.0}),
    ("GKD", {"peft_config": LORA}),
    ("GKD", {"width": 64}),
    ("GOLD", {"beta": 0.5, "temperature": 0.7}),
    *(("Distillation", {"beta": beta}) for beta in (0.0, 0.5, 1.0)),
    ("Distillation", {"temperature": 0.7, "peft_config": LORA, "width": 64}),
    *(("SDPO", {"distillation_alpha": alpha}) for alpha in (0.0, 0.5, 1.0)),
    ("SDPO", {"distillation_mode": "sampled_token", "temperature": 0.7} | STALE),
    ("SDPO", {"distillation_alpha": 0.5, "temperature": 0.7} | STALE),
    ("SDPO", {"distillation_weight": 0.5} | STALE),
    ("SDPO", {"distillation_weight": 0.0} | STALE),
    ("SDPO", {"teacher_model_kind": "base", "peft_config": LORA}),
    ("SDPO", {"success_reward_threshold": 9.0}),  # no teacher context at all: a loss of 0 with a graph
    ("SDFT", {"distillation_alpha": 0.5, "num_loss_tokens_to_skip": 2}),
    ("SDFT", {"distillation_mode": "sampled_token", "distillation_alpha": 1.0} | STALE),
    ("SDFT", {"teacher_model_kind": "base", "peft_config": LORA}),
]


def built(family: str, folder: Path, width: int = 32, vocab_size: int = 32, **fields: Any) -> Any:
    trainer, config, rows, own = FAMILIES[family]
    fields = own | fields
    vocab_size = max(vocab_size, 260) if family == "GOLD" else vocab_size
    options = world.options(folder, num_generations=4) | fields
    others = {"peft_config": options.pop("peft_config")} if "peft_config" in options else {}
    if family in TAUGHT:
        others["teacher_model"] = world.model(vocab_size=vocab_size, hidden_size=width, initializer_range=0.1)
        options.pop("num_generations")
    if family in ("SDPO",):
        others["reward_funcs"] = world.reward
    if family == "GKD":
        options.pop("max_completion_length")
    return trainer(
        model=world.model(vocab_size=vocab_size),
        args=config(**options),
        train_dataset=world.dataset(rows),
        processing_class=world.byte_tokenizer() if family == "GOLD" else world.tokenizer(),
        **others,
    )


def run(family: str, folder: Path, ours: bool, **fields: Any) -> tuple[Any, list[float]]:
    trainer = built(family, folder, **fields)
    losses: list[float] = []
    take = type(trainer).compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = take(self, *args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.__class__ = type(trainer.__class__.__name__, (trainer.__class__,), {"compute_loss": compute_loss})
    with linear_distillation(trainer) if ours else contextlib.nullcontext():
        trainer.train()
    return trainer, losses


@pytest.mark.parametrize(("family", "fields"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_losses_and_gradients_are_those_of_its_own_path(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    ours, losses = run(family, tmp_path, True, **fields)
    theirs, want = run(family, tmp_path, False, **fields)
    assert losses == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert len(want) == 6
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict(), rtol=1e-4, atol=2e-6)
    logs = ours.state.log_history, theirs.state.log_history
    for log, their_log in zip(*logs):
        names = {n for n in their_log if "time" not in n and "second" not in n}
        assert {n: log[n] for n in names} == pytest.approx({n: their_log[n] for n in names}, rel=1e-3, abs=1e-5)
    if fields.get("success_reward_threshold") != 9.0:
        assert any(abs(loss) > 1e-3 for loss in want)
        fresh = built(family, tmp_path, **fields).model.state_dict()
        assert any(not torch.equal(w, fresh[name]) for name, w in theirs.model.state_dict().items())


class Logits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts results that are as wide as the vocabulary and as long as the loss tokens."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        super().__init__()
        self.size, self.found = tokens * vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if has_body(func):
            with self:
                out = run_body(func, args)
        else:
            out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.found += x.untyped_storage().nbytes() // x.element_size() >= self.size
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_no_matrix_of_tokens_by_vocabulary_exists(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgcd_kernels.backends.torch import blocks

    monkeypatch.setitem(blocks.WORKSPACE_BYTES, "cpu", 1 << 20)  # a fifth of 250 tokens' logits
    vocabulary, batch = 5_000, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    long = {"max_new_tokens" if family == "GKD" else "max_completion_length": 40}
    if family in ("GKD", "GOLD"):
        trainer_class, config, rows, own = FAMILIES[family]
        longer = [_longer(row, 40 if family == "GKD" else 12) for row in rows]
        monkeypatch.setitem(FAMILIES, family, (trainer_class, config, longer, own))
    found = {}
    for ours in (True, False):
        trainer = built(family, tmp_path, vocab_size=vocabulary, **batch, **long)
        with linear_distillation(trainer) if ours else contextlib.nullcontext():
            inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            trainer.current_gradient_accumulation_steps = 1
            with Logits(250, vocabulary) as counter:
                trainer.compute_loss(trainer.model, inputs).backward()
        found[ours] = counter.found
    assert found[True] == 0 < found[False]


def _longer(row: dict[str, Any], words: int) -> dict[str, Any]:
    made = copy.deepcopy(row)
    made["messages"][1]["content"] = " ".join(f"w{i % 9}" for i in range(words))
    return made


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("SDFT", {"distillation_mode": "topk_logits", "distillation_topk": 5}, "topk_logits"),
        ("SDPO", {"distillation_mode": "topk_logits", "distillation_topk": 5}, "top-k vocab ids"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    family: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = built(family, tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as refusal, linear_distillation(trainer):
        pass
    assert f"{family}Trainer" in str(refusal.value)


def test_other_trainers_are_refused_by_name(tmp_path: Path) -> None:
    class Mine(IWOPDTrainer):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    with pytest.raises(ValueError, match="IWOPDTrainer is not served"), linear_distillation(Mine()):
        pass
    with pytest.raises(ValueError, match="serves DistillationTrainer, GKDTrainer"), linear_distillation(object()):
        pass


def test_heads_that_differ_are_refused(tmp_path: Path) -> None:
    trainer = built("GKD", tmp_path)
    trainer.teacher_model = world.model(Gemma2Config, head_dim=8, final_logit_softcapping=3.0)
    with pytest.raises(ValueError, match="softcap None, the teacher's 3"), linear_distillation(trainer):
        pass


def test_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    """The head's weight does not contain it: the loss would ignore the adapter."""
    trainer = built("SDFT", tmp_path, peft_config=LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="the head has an adapter on it, needs none"), linear_distillation(trainer):
        pass


def test_outside_the_context_the_trainer_is_as_it_was(tmp_path: Path) -> None:
    trainer = built("SDPO", tmp_path)
    module = __import__(SDPOTrainer.__module__, fromlist=["selective_log_softmax"])
    before = module.selective_log_softmax
    with contextlib.suppress(RuntimeError), linear_distillation(trainer):
        assert module.selective_log_softmax is not before
        z, ids = torch.randn(2, 3, 7), torch.zeros(2, 3, dtype=torch.long)  # logits of another trainer of the module
        assert torch.equal(module.selective_log_softmax(z, ids), before(z, ids))
        raise RuntimeError
    assert module.selective_log_softmax is before
    assert "_forward_logits" not in vars(trainer)
    ids = torch.tensor([[6, 7, 8]])
    assert trainer.model(input_ids=ids).logits.shape == (1, 3, 32)
