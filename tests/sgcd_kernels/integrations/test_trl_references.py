"""What teachers read, and what is refused before a trainer runs."""

from __future__ import annotations

import asyncio
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (it needs Python 3.11)")
pytest.importorskip("datasets", reason="datasets is not installed")

from dataclasses import fields

from peft import LoraConfig
from transformers import ProcessorMixin
from trl import GRPOConfig

from sgcd_kernels import CreditConfig
from sgcd_kernels.integrations import trl as package
from sgcd_kernels.integrations.trl import SGCDConfig, SGCDTrainer, Siblings
from sgcd_kernels.integrations.trl.references import ask, teacher_prompt
from tests.sgcd_kernels.integrations import trl_world as world
from tests.sgcd_kernels.integrations.trl_world import quick_collection  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_config_has_the_fields_of_credit_config(tmp_path: Path) -> None:
    made = SGCDConfig(**world.options(tmp_path))
    ours = {f.name: f for f in fields(SGCDConfig)}
    for field in fields(CreditConfig):
        if field.name != "seed":
            assert ours[field.name].default == field.default, field.name
    assert made.credit() == CreditConfig(seed=made.seed)
    assert SGCDConfig(**world.options(tmp_path), gamma=0.5, clip=1.5).credit(2) == CreditConfig(
        gamma=0.5, clip=1.5, seed=made.seed + 2
    )
    with pytest.raises(ValueError, match="gamma is -1"):
        SGCDConfig(**world.options(tmp_path), gamma=-1.0)


def test_where_a_reference_goes() -> None:
    user, system = {"role": "user", "content": "do it"}, {"role": "system", "content": "be good"}
    assert teacher_prompt("do it", "R") == "# Reference\nR\n\ndo it"
    assert teacher_prompt([user], "R") == [{"role": "user", "content": "# Reference\nR\n\ndo it"}]
    assert teacher_prompt([system, user], "R") == [{"role": "system", "content": "be good\n\n# Reference\nR"}, user]
    parts = [{"role": "user", "content": [{"type": "text", "text": "do it"}]}]
    told = teacher_prompt(parts, "R")
    assert told is not None and [p["text"] for p in told[0]["content"]] == ["# Reference\nR", "do it"]  # type: ignore[index]
    assert teacher_prompt([user], [system, user]) == [system, user]
    assert teacher_prompt([user], "") is None and teacher_prompt("x", None) is None
    assert user == {"role": "user", "content": "do it"}, "the dataset's message was written to"
    with pytest.raises(ValueError, match="its prompt is text"):
        teacher_prompt("do it", [user])
    with pytest.raises(ValueError, match="assistant messages takes no reference"):
        teacher_prompt([{"role": "assistant", "content": ""}], "R")


def scored(folder: Path, data: Any = None, **others: Any) -> tuple[Any, dict[str, Any]]:
    """A trainer, and the first generation of it with its teacher prompts."""
    trainer = world.built(SGCDTrainer, SGCDConfig, folder, data=data, **others)
    trainer.model.train()
    return trainer, trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def texts(trainer: Any, batch: Any, name: str) -> list[str]:
    return [
        trainer.processing_class.decode(ids[mask != 0])
        for ids, mask in zip(batch[f"{name}_ids"], batch[f"{name}_mask"])
    ]


def test_teachers_read_their_row_and_students_do_not(tmp_path: Path) -> None:
    """Every second row has a reference, as text or messages; the other teachers are their students."""
    user = [{"role": "user", "content": "w1 w2"}]
    rows = [{"prompt": user, "reference": r} for r in ("w20 w21", "", None, "w22")]
    trainer, batch = scored(tmp_path, world.dataset(rows), per_device_train_batch_size=8)
    students, teachers = texts(trainer, batch, "prompt"), texts(trainer, batch, "teacher_prompt")
    assert set(students) == {"<user> w1 w2 <assistant>"}
    plain = "<user> w1 w2 <assistant>"
    assert set(teachers) == {plain, *(f"<user> # Reference {r} w1 w2 <assistant>" for r in ("w20 w21", "w22"))}
    assert batch["has_teacher"].tolist() == [t != plain for t in teachers]
    assert batch["teacher_prompt_mask"][:, -1].all(), "prompts are padded on the left"


def test_a_teachers_whole_prompt_as_messages(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "w1 w2"}]
    told = [{"role": "system", "content": "w23"}, *user]
    data = world.dataset([{"prompt": user, "reference": r} for r in (told, user, told, user)])
    trainer, batch = scored(tmp_path, data)
    for teacher, differs in zip(texts(trainer, batch, "teacher_prompt"), batch["has_teacher"].tolist()):
        assert teacher == ("<system> w23 " if differs else "") + "<user> w1 w2 <assistant>"
    assert 0 < int(batch["has_teacher"].sum()) < len(batch["has_teacher"])


def test_a_function_is_shown_siblings_with_their_rewards(tmp_path: Path) -> None:
    seen: list[Siblings] = []

    def write(group: Siblings) -> str | None:
        seen.append(group)
        return "w23" if len(seen) == 1 else None

    trainer, batch = scored(tmp_path, world.rows().remove_columns("reference"), reference_func=write)
    assert len(seen) == 2 and batch["has_teacher"].tolist() == [True] * 4 + [False] * 4
    students, ids = texts(trainer, batch, "prompt"), batch["completion_ids"]
    for g, group in enumerate(seen):
        assert group.prompt == students[4 * g] and {row["prompt"] for row in group.rows} == {group.prompt}
        kept = [row[m != 0].tolist() for row, m in zip(ids, batch["completion_mask"])]
        assert group.completion_ids == kept[4 * g : 4 * g + 4]
        assert group.rewards == pytest.approx(world.reward(group.completion_ids))
        assert group.completions == trainer.processing_class.batch_decode(
            group.completion_ids, skip_special_tokens=True
        )
    assert texts(trainer, batch, "teacher_prompt")[0] == f"# Reference w23 {students[0]}"


def test_an_async_function_is_asked_about_all_groups_at_once() -> None:
    waiting: list[Any] = []

    async def write(group: Any) -> str:
        waiting.append(group)
        while len(waiting) < 3:
            await asyncio.sleep(0)
        return f"about {group}"

    assert ask(write, ["a", "b", "c"]) == ["about a", "about b", "about c"]  # type: ignore[list-item]


def test_credit_is_for_training_only(tmp_path: Path) -> None:
    trainer = world.built(SGCDTrainer, SGCDConfig, tmp_path)
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert not {"teacher_prompt_ids", "has_teacher"} & set(batch)


def test_prompts_of_another_template_are_refused(tmp_path: Path) -> None:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        made = world.two_turns(prompts, trainer)
        return made | {"prompt_ids": [[7, *ids] for ids in made["prompt_ids"]]}

    with pytest.raises(ValueError, match="rollout_func's prompt_ids differ"):
        scored(tmp_path, rollout_func=rollout)


class Quantised(torch.nn.Linear):
    """As bitsandbytes has it: a weight of bytes."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.weight = torch.nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)


def quantised() -> Any:
    policy = world.model()
    policy.lm_head = Quantised()
    return policy


class Pictures(ProcessorMixin):  # type: ignore[misc]
    def __init__(self) -> None:
        self.tokenizer = world.tokenizer()


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no column": ({"data": world.rows().remove_columns("reference")}, "has no column 'reference' .it has prompt."),
    "its name": ({"reference_column": "hint"}, "has no column 'hint'"),
    "removed": ({"remove_unused_columns": True}, "remove_unused_columns is True, needs False"),
    "not a function": ({"reference_func": "w1"}, "reference_func is str"),
    "half a group": (
        {"reference_func": len, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
        "generates 2 rollouts",
    ),
    "dropout": (
        {"peft_config": LoraConfig(lora_dropout=0.1, target_modules="all-linear")},
        r"lora_dropout.*drops out with p = 0.1.*disable_dropout=True",
    ),
    "dropout of attention": (
        {"policy": lambda: world.model(attention_dropout=0.2), "disable_dropout": True},
        r"layers.0.self_attn drops out with attention_dropout = 0.2.*needs 0.0 in the model's config",
    ),
    "one ratio a sequence": (
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        "importance_sampling_level is 'sequence', needs 'token'",
    ),
    "quantised head": ({"policy": quantised}, "the head's weight is torch.uint8, needs a float"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_work_is_refused_at_construction(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, message = REFUSALS[name]
    given = {key: value() if key == "policy" else value for key, value in given.items()}
    if name == "half a group":  # two processes, which make the batch whole between them
        monkeypatch.setattr(SGCDConfig, "world_size", property(lambda self: 2))
    with pytest.raises((ValueError, TypeError), match=message):
        world.built(SGCDTrainer, SGCDConfig, tmp_path, **given)


def test_the_remedies_work(tmp_path: Path) -> None:
    lora = LoraConfig(lora_dropout=0.1, target_modules="all-linear")
    world.built(SGCDTrainer, SGCDConfig, tmp_path, peft_config=lora, disable_dropout=True)
    world.built(SGCDTrainer, SGCDConfig, tmp_path, data=world.rows().remove_columns("reference"), rule="none")


def test_a_plain_config_and_a_processor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args is GRPOConfig, needs SGCDConfig"):
        world.built(SGCDTrainer, GRPOConfig, tmp_path)
    with pytest.raises(ValueError, match="processing_class is a Pictures, needs a tokenizer for credit"):
        SGCDTrainer(
            world.model(),
            world.reward,
            SGCDConfig(**world.options(tmp_path)),
            world.rows(),
            processing_class=Pictures(),
        )


def test_zero_3_is_refused(tmp_path: Path) -> None:
    args = SGCDConfig(**world.options(tmp_path))
    args.deepspeed_plugin = type("Plugin", (), {"zero_stage": 3})()
    with pytest.raises(ValueError, match="ZeRO-3 is not supported"):
        SGCDTrainer(world.model(), world.reward, args, world.rows(), processing_class=world.tokenizer())


@pytest.mark.parametrize("found", ["1.14.0", "1.17.0", "2.0.0"])
def test_another_trl_is_refused_with_the_versions_that_fit(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"trl is {found}.*fits 1.15.x and 1.16.x"):
        _ = package.SGCDTrainer


def test_importing_it_loads_nothing() -> None:
    code = (
        "import sys, sgcd_kernels, sgcd_kernels.integrations.trl\n"
        "print([m for m in ('trl', 'transformers', 'datasets', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
