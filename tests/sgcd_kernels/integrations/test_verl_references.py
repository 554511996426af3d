"""From verl's rollouts to teacher_input_ids: its data structures, its configs, its template, its trainer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed", allow_module_level=True)

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer.constants_ppo import get_ppo_ray_runtime_env
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from sgcd_kernels.integrations.trl.references import Siblings
from sgcd_kernels.integrations.verl import register  # noqa: F401  # the policy losses
from sgcd_kernels.integrations.verl.references import padding_rows, teacher_field
from sgcd_kernels.integrations.verl.settings import check_config, reference_function
from tests.sgcd_kernels.integrations import trl_world as world

ROOT = Path(__file__).resolve().parents[3]
HAS_QUEUE = importlib.util.find_spec("transfer_queue") is not None
needs_queue = pytest.mark.skipif(not HAS_QUEUE, reason="TransferQueue is not installed")

TASKS = {"a": "w1 w2", "b": "w3"}
# (uid, what the policy wrote, reward) in the order of a balanced batch: groups lie mixed.
ROLLOUTS = [("a", "w9 w9 w9 </s>", 1.0), ("b", "w8", 0.0), ("a", "w7 w7", 0.0), ("b", "w6 w6", 0.0)]


def messages(uid: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": TASKS[uid]}]


def render(given: list[dict[str, Any]]) -> list[int]:
    text = world.tokenizer().apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    return list(world.tokenizer()(text).input_ids)


def rollouts() -> list[dict[str, Any]]:
    """As verl's agent loop passes them, with a padding row at the end."""
    made = []
    for uid, text, reward in ROLLOUTS:
        prompt, response = torch.tensor(render(messages(uid))), torch.tensor(world.tokenizer()(text).input_ids)
        scores = torch.zeros(len(response))
        scores[-1] = reward
        made.append(
            {
                "uid": uid,
                "raw_prompt": messages(uid),
                "prompts": prompt,
                "responses": response,
                "input_ids": torch.cat([prompt, response]),
                "response_mask": torch.ones_like(response),
                "rm_scores": scores,
                "extra_info": {"about": uid},
            }
        )
    filler = made[0] | {
        "prompts": torch.tensor([1, 1, 1]),
        "responses": torch.tensor([1]),
        "input_ids": torch.ones(4).long(),
    }
    return [*made, filler | {"response_mask": torch.tensor([0]), "rm_scores": torch.tensor([0.0])}]


TAGS: list[dict[str, Any]] = [{}, {}, {}, {}, {"is_padding": True}]


def field(function: Any, rows: list[dict[str, Any]] | None = None) -> tuple[list[list[int]], float]:
    batch = list_of_dict_to_tensordict(rollouts() if rows is None else rows)
    found, share = teacher_field(batch, padding_rows(TAGS), function, render, world.tokenizer().decode)
    return [row.tolist() for row in found.unbind()], share


@pytest.mark.parametrize("kind", ["text", "messages", "ids", "async"])
def test_a_reference_is_in_the_prompt_of_its_group_alone(kind: str) -> None:
    seen: list[Siblings] = []
    told = [{"role": "user", "content": "# Reference\nw20 w21\n\nw1 w2"}]

    def write(group: Siblings) -> Any:
        seen.append(group)
        answers = {"text": "w20 w21", "messages": told, "ids": render(told), "async": "w20 w21"}
        return answers[kind] if group.rows[0]["extra_info"]["about"] == "a" else None

    async def later(group: Siblings) -> Any:
        return write(group)

    rows = rollouts()
    found, share = field(later if kind == "async" else write)
    assert share == 0.5
    for row, got in zip(rows, found, strict=True):
        student = row["input_ids"].tolist()
        response = row["responses"].tolist()
        teacher = render(told) + response
        assert got == (teacher if row["uid"] == "a" and len(response) > 1 else student)
    by_prompt = {group.prompt[0]["content"]: group for group in seen}  # type: ignore[index]
    assert set(by_prompt) == {"w1 w2", "w3"}
    first = by_prompt["w1 w2"]
    assert (first.completions, first.rewards) == (["w9 w9 w9 </s>", "w7 w7"], [1.0, 0.0])
    assert first.completion_ids == [rows[0]["responses"].tolist(), rows[2]["responses"].tolist()]


def test_prompts_that_the_template_does_not_give_are_refused() -> None:
    """An agent with tools of its own: the template alone would give the teacher another prompt."""
    rows = rollouts()
    rows[2]["prompts"] = torch.tensor([7, 7, *rows[2]["prompts"].tolist()])
    with pytest.raises(
        ValueError, match=r"the rollout's prompt has 6 tokens, the chat template gives 4 .*of token ids"
    ):
        field(lambda group: "w20", rows)
    assert field(lambda group: [9, 9], rows)[1] == 1.0


def config(*overrides: str) -> Any:
    with initialize_config_dir(str(ROOT / "examples" / "verl"), version_base=None):
        return compose("sgcd", list(overrides))


LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{LOSS}=vanilla", "loss_mode is 'vanilla', which takes no token weights; needs one of sgcd, "),
        (f"{LOSS}=sgcd_geo_mean", "loss_mode is 'sgcd_geo_mean', which averages the advantages of a sequence first"),
        ("actor_rollout_ref.actor.strategy=fsdp", "strategy is 'fsdp', needs 'fsdp2'"),
        ("actor_rollout_ref.model.use_fused_kernels=false", "use_fused_kernels is False, needs True"),
    ],
)
def test_configs_without_credit_are_refused(override: str, message: str) -> None:
    check_config(config())
    with pytest.raises(ValueError, match=message):
        check_config(config(override))


def test_the_examples_function_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where docs/verl.md says that the command is given
    write = reference_function(config())
    ids = [[1], [2]]
    group = Siblings(messages("a"), ["w9 w9 w9", "w7 w7"], ids, [1.0, 0.0], [{}, {}])
    assert write(group) == "Another attempt at this task succeeded:\nw9 w9 w9"
    assert write(Siblings(messages("a"), ["w9", "w7"], ids, [1.0, 1.0], [{}, {}])) is None
    with pytest.raises(ValueError, match=r"reference_func is None, needs path and name of a function"):
        reference_function(config("trainer.v1.sgcd_sync.reference_func=null"))
    with pytest.raises(ValueError, match="names a str, needs a function of Siblings"):
        reference_function(config("trainer.v1.sgcd_sync.reference_func.name=__doc__"))


def test_every_process_of_the_examples_run_imports_the_trainer() -> None:
    """As verl's main_ppo merges what Ray is started with."""
    merged = OmegaConf.merge(get_ppo_ray_runtime_env(config()), config().ray_kwargs.ray_init.runtime_env)
    assert merged.env_vars.VERL_USE_EXTERNAL_MODULES == "sgcd_kernels.integrations.verl.trainer"
    assert "NCCL_DEBUG" in merged.env_vars


@needs_queue
@pytest.mark.slow
def test_verl_finds_the_trainer_by_its_name() -> None:
    """In a process like its task runner's, which imports verl and nothing of ours."""
    code = "import verl.trainer.main_ppo\nfrom verl.trainer.ppo.v1 import get_trainer_cls\n"
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "sgcd_kernels.integrations.verl.trainer"}
    code += f"print(get_trainer_cls({config().trainer.v1.trainer_mode!r}).__name__)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("SGCDTrainerSync"), done.stderr[-2000:]


@needs_queue
@pytest.mark.slow
def test_the_trainer_puts_the_field_into_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's real trainer and TransferQueue, in a Ray of this machine: all but the workers."""
    import ray
    import transfer_queue as tq

    from sgcd_kernels.integrations.verl.trainer import SGCDTrainerSync

    world.model(hidden_size=8, intermediate_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    world.tokenizer().save_pretrained(tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    settings = config(f"actor_rollout_ref.model.path={tmp_path}")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
        trainer = SGCDTrainerSync(settings)
        assert trainer.trainer_mode == "sync"
        trainer._init_tokenizer()
        keys = [f"{row['uid']}_{i}_0" for i, row in enumerate(rollouts())]
        batch = tq.kv_batch_put(keys, "train", fields=list_of_dict_to_tensordict(rollouts()), tags=TAGS)
        metrics: dict[str, Any] = {}
        batch = trainer._compute_advantage(batch, metrics)
        assert metrics["credit/frac_referenced"] == 0.5  # of group b all attempts failed
        assert {"teacher_input_ids", "advantages"} <= set(batch.fields)
        found = tq.kv_batch_get(keys, "train", select_fields=["teacher_input_ids", "input_ids"])
    finally:
        tq.close()
        ray.shutdown()
    words = world.tokenizer().decode
    teacher, student = (found[name].unbind() for name in ("teacher_input_ids", "input_ids"))
    block = "# Reference <unk> <unk> <unk> <unk> <unk> <unk> w9 w9 w9"
    for row in (0, 2):
        assert words(teacher[row]) == words(student[row]).replace("<user>", f"<user> {block}")
    for row in (1, 3, 4):
        assert torch.equal(teacher[row], student[row])
