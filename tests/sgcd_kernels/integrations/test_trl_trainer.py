"""SGCDTrainer against TRL's own GRPOTrainer, and against a calculation by hand with full logits."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (it needs Python 3.11)")
pytest.importorskip("datasets", reason="datasets is not installed")

from peft import LoraConfig
from transformers import Cohere2Config, Gemma2Config, Qwen3MoeConfig
from trl import GRPOConfig, GRPOTrainer

from sgcd_kernels import CreditConfig, reference
from sgcd_kernels.backends.torch import blocks
from sgcd_kernels.integrations.trl import SGCDConfig, SGCDTrainer
from sgcd_kernels.integrations.trl import trainer as integration
from tests.sgcd_kernels.backends.cases import has_body, run_body
from tests.sgcd_kernels.integrations import trl_world as world
from tests.sgcd_kernels.integrations.trl_world import quick_collection  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

# Two updates of two micro-batches each on one generation, so that the ratio to the policy that sampled is not 1.
STALE = {"steps_per_generation": 4}
LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
CASES: dict[str, dict[str, Any]] = {
    **{name: STALE | {"loss_type": name} for name in LOSSES},
    **{f"lora {name}": STALE | {"loss_type": name, "peft_config": LORA} for name in LOSSES[:4]},
    "on-policy": {},
    "temperature": STALE | {"temperature": 0.6},
    "sequence": STALE | {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "delta": STALE | {"delta": 1.05},
    "high-entropy tokens": STALE | {"top_entropy_quantile": 0.5},
    "entropy bonus": STALE | {"entropy_coef": 0.1},
    "off-policy mask": STALE | {"off_policy_mask_threshold": 1e-3},
    "truncated": STALE | {"mask_truncated_completions": True},
    "tools": STALE | {"rollout_func": world.two_turns},
    "checkpointing": STALE | {"gradient_checkpointing": True},
    "lora checkpointing": STALE | {"gradient_checkpointing": True, "peft_config": LORA},
    "mixture of experts": STALE | {"policy": (Qwen3MoeConfig, MOE)},
    "softcap": STALE | {"policy": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0})},
    "logit scale": STALE | {"policy": (Cohere2Config, {"logit_scale": 0.25, "scale": 1.0})},
}


def half() -> Any:
    """A policy in bf16 whose head TRL casts to fp32."""
    return world.model().to(torch.bfloat16)


CASES["head in fp32"] = STALE | {"cast_lm_head_to_fp32": True, "policy": half}


def watched(base: Any) -> Any:
    """The trainer, and a list of (its weights, the micro-batch, the loss) for every loss it takes."""

    class Watched(base):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            before = copy.deepcopy(model.state_dict())
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            vars(self).setdefault("seen", []).append((before, dict(inputs), loss.item()))
            return loss

    return Watched


def run(base: Any, config: Any, folder: Path, policy: Any = None, **fields: Any) -> Any:
    made = world.model(policy[0], **policy[1]) if isinstance(policy, tuple) else policy
    made = policy() if callable(policy) else made
    trainer = world.built(watched(base), config, folder, policy=made, **fields)
    trainer.train()
    return trainer


def close_runs(ours: Any, stock: Any) -> None:
    """Same tokens, losses and weights at every micro-batch, to fp32 rounding."""
    assert len(ours.seen) == len(stock.seen) == 6
    for (weights, batch, loss), (their_weights, their_batch, their_loss) in zip(ours.seen, stock.seen):
        assert torch.equal(batch["completion_ids"], their_batch["completion_ids"])
        assert loss == pytest.approx(their_loss, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(weights, their_weights, rtol=1e-4, atol=1e-6)
    assert any(abs(loss) > 1e-3 for _, _, loss in stock.seen)
    torch.testing.assert_close(ours.model.state_dict(), stock.model.state_dict(), rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(a, stock.seen[0][0][name]) for name, a in stock.model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_without_credit_it_is_the_stock_trainer(name: str, tmp_path: Path) -> None:
    ours = run(SGCDTrainer, SGCDConfig, tmp_path, gamma=0.0, **CASES[name])
    close_runs(ours, run(GRPOTrainer, GRPOConfig, tmp_path, **CASES[name]))
    logs = [dict(log) for log in ours.state.log_history]
    assert not any(key.startswith("credit/") for log in logs for key in log)


@pytest.mark.parametrize("fields", [{"beta": 0.1}, {"beta": 0.1, "use_bias_correction_kl": True}])
def test_the_reference_policy_of_a_kl_term(fields: dict[str, Any], tmp_path: Path) -> None:
    world.model().save_pretrained(tmp_path / "model")
    world.tokenizer().save_pretrained(tmp_path / "model")
    fields = STALE | fields | {"policy": str(tmp_path / "model")}
    ours = run(SGCDTrainer, SGCDConfig, tmp_path, gamma=0.0, **fields)
    close_runs(ours, run(GRPOTrainer, GRPOConfig, tmp_path, **fields))
    assert ours.state.log_history[1]["kl"] > 0


def test_mixed_precision_is_within_its_rounding(tmp_path: Path) -> None:
    """Under bf16 autocast both heads round their inputs; ours alone sums the logits in fp32."""
    ours = run(SGCDTrainer, SGCDConfig, tmp_path, gamma=0.0, bf16=True, temperature=0.6, max_steps=1)
    stock = run(GRPOTrainer, GRPOConfig, tmp_path, bf16=True, temperature=0.6, max_steps=1)
    assert torch.equal(ours.seen[0][1]["completion_ids"], stock.seen[0][1]["completion_ids"])
    logs = ours.state.log_history[0], stock.state.log_history[0]
    for name in ("grad_norm", "entropy"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=2e-2)
    credited = run(SGCDTrainer, SGCDConfig, tmp_path, bf16=True, d_floor=1e-3)
    assert credited.state.log_history[0]["credit/mean_weight"] > 1


def by_hand(trainer: Any, weights: Any, batch: Any, config: CreditConfig, temperature: float, loss_type: str) -> Any:
    """(loss, d of each row's tokens, A W), from full logits in fp64; the temperature divides them once."""
    policy = world.model().double()
    policy.load_state_dict(weights)
    tokenizer = world.tokenizer()
    ids, kept = batch["completion_ids"], batch["completion_mask"].bool()
    masks = kept if "tool_mask" not in batch else kept & batch["tool_mask"].bool()
    logps, credited, lengths, divergences = [], [], [0], []
    for i, row in enumerate(ids):
        length = int(kept[i].sum())
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        text = tokenizer.decode(prompt)
        told = tokenizer(f"# Reference {world.rows()[int(text.split()[0][1:])]['reference']} {text}")["input_ids"]
        rows = [
            policy(input_ids=torch.tensor([start + row[:length].tolist()])).logits[0, len(start) - 1 : -1]
            for start in (prompt, told)
        ]
        p, q = (z.double() / temperature for z in rows)
        mine = masks[i, :length]
        turns = (mine & ~torch.nn.functional.pad(mine, (1, 0))[:-1]).cumsum(0)
        d, h = reference.kl(p, q)[mine], reference.logprob(q, row[:length])[1][mine]
        w, _, _ = reference.sgcd_credit(d.tolist(), h.tolist(), turns[mine].tolist(), config)
        weighted = torch.ones(length, dtype=torch.float64).masked_scatter(mine, torch.tensor(w).double())
        credited.append(batch["advantages"][i].double() * weighted)
        logps.append(reference.logprob(p, row[:length])[0])
        lengths.append(lengths[-1] + length)
        divergences.append(d)
    mask = torch.cat([m[: stop - start] for m, start, stop in zip(masks, lengths, lengths[1:])])
    old = batch.get("old_per_token_logps")
    steps = {"grpo": len(ids), "dr_grpo": len(ids) * 6, "bnpo": int(mask.sum())}
    items = steps.get(loss_type, float(batch["num_items_in_batch"]) / trainer.args.steps_per_generation)
    loss = reference.policy_loss(
        torch.cat(logps),
        torch.cat(credited),
        mask,
        lengths,
        loss_type=loss_type,
        old_logp=None if old is None else torch.cat([o[k] for o, k in zip(old.double(), kept)]),
        num_items_in_batch=items * 2,
    )
    return loss, divergences, credited


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize(
    "fields", [{}, STALE, {"temperature": 0.6}, {"rollout_func": world.two_turns}], ids=["", "stale", "T", "tools"]
)
def test_credit_is_as_calculated_by_hand(loss_type: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config = {"gamma": 0.8, "d_floor": 0.02, "start": 0.3, "reset": 0.2, "patience": 2}
    trainer = run(SGCDTrainer, SGCDConfig, tmp_path, loss_type=loss_type, **config, **fields)
    plain = run(GRPOTrainer, GRPOConfig, tmp_path, loss_type=loss_type, **fields)
    temperature, changed = fields.get("temperature", 1.0), 0
    for weights, batch, loss in trainer.seen:
        assert batch["advantages"].dim() == 1, "the buffered batch was written to"
        hand, _, credited = by_hand(trainer, weights, batch, CreditConfig(**config), temperature, loss_type)
        assert loss == pytest.approx(hand.item(), rel=1e-4, abs=2e-6)
        changed += sum(bool((c.abs() > a.abs() * 1.1).any()) for c, a in zip(credited, batch["advantages"]))
    assert changed > 4
    assert trainer.seen[0][2] != pytest.approx(plain.seen[0][2], abs=1e-3)


@pytest.mark.parametrize(
    "fields",
    [{"loss_type": name} for name in LOSSES] + [{"loss_type": "cispo", "importance_sampling_level": "sequence"}],
    ids=lambda fields: " ".join(fields.values()),
)
def test_it_matters_which_token_has_the_weight(fields: dict[str, Any], tmp_path: Path) -> None:
    """The same weights on other tokens, as rule "permuted" has them, are another update."""
    config = {"d_floor": 1e-3, "start": 0.5, "reset": 0.4, "patience": 1, "max_steps": 1} | fields
    ours, moved = (run(SGCDTrainer, SGCDConfig, tmp_path, rule=rule, **config) for rule in ("sgcd", "permuted"))
    logs = [t.state.log_history[0]["credit/mean_weight"] for t in (ours, moved)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5) and 1 < logs[0] < 2
    before = world.model().state_dict()
    after, other = ours.model.state_dict(), moved.model.state_dict()
    update = sum((after[n] - w).square().sum() for n, w in before.items()).sqrt()
    difference = sum((after[n] - other[n]).square().sum() for n in before).sqrt()
    assert difference > 0.05 * update


def test_signs_stay_and_weights_are_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(student: Any, teacher: Any, batch: Any, config: CreditConfig) -> Any:
        seen.append((batch, *weigh(student, teacher, batch, config)))
        return seen[-1][1:]

    weigh = integration.weigh
    monkeypatch.setattr(integration, "weigh", spy)
    run(SGCDTrainer, SGCDConfig, tmp_path, d_floor=1e-3, rollout_func=world.two_turns)
    weights = []
    for batch, weighted, _ in seen:
        advantages = batch.advantages[:, None].expand_as(weighted)
        assert torch.equal(weighted.sign(), advantages.sign())
        assert not weighted.requires_grad
        assert torch.equal(weighted[batch.mask == 0], advantages[batch.mask == 0])
        weights.append((weighted / advantages)[advantages != 0])
    w = torch.cat(weights)
    assert w.min() >= 1 - 1e-6 and 1.5 < w.max() <= 2 + 1e-6
    logs = run(SGCDTrainer, SGCDConfig, tmp_path, d_floor=1e-3).state.log_history
    names = {key for key in logs[0] if key.startswith("credit/")}
    assert names == {
        f"credit/{name}"
        for name in (
            "mean_divergence mean_weight frac_salient frac_saturated num_spans mean_span_length teacher_entropy inert "
            "frac_referenced"
        ).split()
    }
    assert logs[0]["credit/frac_referenced"] == 1 and logs[0]["credit/mean_weight"] > 1


@pytest.mark.parametrize("nothing", ["", None])
def test_without_a_reference_nothing_is_weighted(nothing: Any, tmp_path: Path) -> None:
    """Bit by bit the run of gamma 0, d exactly 0."""
    data = world.rows(reference=nothing)
    ours = run(SGCDTrainer, SGCDConfig, tmp_path, data=data, **STALE)
    plain = run(SGCDTrainer, SGCDConfig, tmp_path, data=data, gamma=0.0, **STALE)
    assert [loss for _, _, loss in ours.seen] == [loss for _, _, loss in plain.seen]
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(weight, plain.model.state_dict()[name])
    log = ours.state.log_history[0]
    assert (log["credit/mean_divergence"], log["credit/mean_weight"], log["credit/frac_referenced"]) == (0, 1, 0)


def test_a_row_without_a_reference_has_no_credit_whatever_the_rule(tmp_path: Path) -> None:
    """Rule "uniform" gives W = 2 to every token that may carry credit."""
    data = world.dataset([row | {"reference": row["reference"] * (i % 2)} for i, row in enumerate(world.rows())])
    trainer = run(SGCDTrainer, SGCDConfig, tmp_path, data=data, rule="uniform", max_steps=8)
    shares = [log["credit/frac_referenced"] for log in trainer.state.log_history[:-1]]
    weights = [log["credit/mean_weight"] for log in trainer.state.log_history[:-1]]
    assert 0 in shares and 1 in shares, "groups of 4 are micro-batches of 4, so a micro-batch has all or none"
    assert all(w == (2 if share == 1 else 1) for share, w in zip(shares, weights) if share in (0, 1))


@pytest.mark.filterwarnings("ignore:credit is inert:RuntimeWarning")
def test_a_rule_without_effect_warns(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="all weights are 1"):
        run(SGCDTrainer, SGCDConfig, tmp_path, d_floor=1e6)  # no token diverges so much


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any operator gave back, those inside our ops too."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if has_body(func):
            with self:
                out = run_body(func, args)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_no_matrix_of_tokens_by_vocabulary_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, credit, loss and gradient stay within the library's workspace; TRL's own head does not."""
    vocabulary, budget = 8_000, 1 << 20
    monkeypatch.setitem(blocks.WORKSPACE_BYTES, "cpu", budget)
    fields = {"max_completion_length": 50, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    found = {}
    for base, config in ((SGCDTrainer, SGCDConfig), (GRPOTrainer, GRPOConfig)):
        trainer = world.built(base, config, tmp_path, policy=world.model(vocab_size=vocabulary), **fields)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        assert int(inputs["completion_mask"].sum()) * vocabulary > 8 * budget / 4
        trainer.current_gradient_accumulation_steps = 1
        with Largest() as seen:
            trainer.compute_loss(trainer.model, inputs).backward()
        found[base] = seen.elements
    assert vocabulary * 32 <= found[SGCDTrainer] <= budget / 4 < found[GRPOTrainer]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Data parallel: without credit the stock trainer, with it whole groups on every process and metrics of both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.sgcd_kernels.integrations.trl_two_processes", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    (stock, their_weights), (idle, weights), (credit, credited) = (found[n] for n in ("stock", "idle", "credit"))
    for log, their_log in zip(idle, stock):
        names = {n for n in their_log if "time" not in n and "second" not in n}
        assert {n: log[n] for n in names} == pytest.approx({n: their_log[n] for n in names}, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(weights, their_weights, rtol=1e-4, atol=2e-6)
    assert credit[0]["credit/frac_referenced"] == 1 and credit[0]["credit/mean_weight"] > 1
    assert any(not torch.allclose(w, weights[name], atol=1e-4) for name, w in credited.items())
