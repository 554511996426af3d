"""SGCDTrainer where GRPOTrainer stood: the same arguments, in the same places, with the same effect."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (it needs Python 3.11)")
pytest.importorskip("datasets", reason="datasets is not installed")

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from sgcd_kernels.integrations.trl import SGCDConfig, SGCDTrainer
from tests.sgcd_kernels.integrations import trl_world as world
from tests.sgcd_kernels.integrations.trl_world import quick_collection  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
BOTH = ((GRPOTrainer, GRPOConfig, {}), (SGCDTrainer, SGCDConfig, {"gamma": 0.0}))


def known(function: Any) -> list[tuple[str, Any, Any]]:
    return [(name, p.kind, p.default) for name, p in inspect.signature(function).parameters.items()]


def test_arguments_have_the_places_and_defaults_of_the_original() -> None:
    stock, ours = known(GRPOTrainer), known(SGCDTrainer)
    assert ours[: len(stock)] == stock
    assert [name for name, *_ in ours[len(stock) :]] == ["reference_func"]
    config, our_config = ({f.name: f.default for f in fields(c)} for c in (GRPOConfig, SGCDConfig))
    assert {name: our_config[name] for name in config} == config
    assert known(SGCDConfig)[: len(known(GRPOConfig))] == known(GRPOConfig)


class Counter(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def brevity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-len(set(ids)) / 6 for ids in completion_ids]


def close_runs(ours: Any, stock: Any, *, rtol: float = 1e-4) -> None:
    logs = [
        [log.get(k) for log in t.state.log_history for k in ("loss", "reward", "eval_reward")] for t in (ours, stock)
    ]
    assert sum(x is not None for x in logs[1]) >= 4
    assert logs[0] == [None if x is None else pytest.approx(x, rel=rtol, abs=1e-6) for x in logs[1]]
    torch.testing.assert_close(ours.model.state_dict(), stock.model.state_dict(), rtol=rtol, atol=1e-6)


def test_everything_by_position(tmp_path: Path) -> None:
    """Two rewards with weights, evaluation, a callback, an optimizer of one's own, two updates per generation."""
    made = []
    for base, config, more in BOTH:
        policy, callback = world.model(), Counter()
        optimizer = torch.optim.SGD(policy.parameters(), lr=3e-2, momentum=0.5)
        options = {"num_iterations": 2, "max_steps": 4, "reward_weights": [1.0, 0.5], "eval_strategy": "steps"}
        args = config(**world.options(tmp_path, eval_steps=2, per_device_eval_batch_size=4, **options), **more)
        trainer = base(
            policy,
            [world.reward, brevity],
            args,
            world.rows(),
            world.rows(4),
            world.tokenizer(),
            [None, None],
            [callback],
            (optimizer, None),
        )
        trainer.train()
        assert callback.steps == 4
        assert trainer.optimizer.optimizer is optimizer
        made.append(trainer)
    close_runs(made[1], made[0])
    assert "rewards/brevity/mean" in made[1].state.log_history[0]


def pictures() -> tuple[Any, Any]:
    """(a processor, a function that makes a vision-language model), both tiny, of Llava's architecture."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("PIL", reason="the processor needs Pillow")
    image_processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    words = world.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.image_token = "<image>"
    processor = transformers.LlavaProcessor(
        image_processor(size={"shortest_edge": 8}, crop_size=8),
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=world.TEMPLATE,
    )

    def model() -> Any:
        torch.manual_seed(0)
        small = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = LlamaConfig(vocab_size=40, hidden_size=32, pad_token_id=0, eos_token_id=1, bos_token_id=None, **small)
        vision = CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, **small)
        image = words.convert_tokens_to_ids("<image>")
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, pad_token_id=0)
        made = transformers.LlavaForConditionalGeneration(config).float()
        with torch.no_grad():
            made.get_output_embeddings().weight.mul_(8)
        return made

    return processor, model


def chats(**columns: Any) -> Any:
    return world.dataset([{"prompt": [{"role": "user", "content": row["prompt"]}]} | columns for row in world.rows()])


def test_a_model_of_images_trains_as_with_the_stock_trainer(tmp_path: Path) -> None:
    processor, model = pictures()
    made = []
    for base, config, more in BOTH:
        trainer = base(
            model(), world.reward, config(**world.options(tmp_path, max_steps=2), **more), chats(), None, processor
        )
        trainer.train()
        made.append(trainer)
    stock, ours = made
    close_runs(ours, stock, rtol=0.0)
    before = model().state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in ours.model.state_dict().items())


def test_a_model_of_images_with_credit_is_refused_with_the_way_on(tmp_path: Path) -> None:
    processor, model = pictures()
    with pytest.raises(
        ValueError, match=r"processing_class is a LlavaProcessor, needs a tokenizer for credit: .*gamma=0.0\) trains"
    ):
        SGCDTrainer(
            model(), world.reward, SGCDConfig(**world.options(tmp_path)), chats(reference="w1"), None, processor
        )


def test_with_the_default_credit_it_asks_for_a_reference(tmp_path: Path) -> None:
    """Credit is what the class is for: a run without it must be asked for. The message names the three ways on."""
    data, args = world.rows().remove_columns("reference"), SGCDConfig(**world.options(tmp_path))
    with pytest.raises(ValueError, match="has no column 'reference'") as error:
        SGCDTrainer(world.model(), world.reward, args, data, data, world.tokenizer())
    for way in ("add it", "reference_column", "reference_func", "SGCDConfig(gamma=0.0) trains without credit"):
        assert way in str(error.value)
    with pytest.raises(TypeError, match=r"args is GRPOConfig, needs SGCDConfig.*gamma=0.0\) trains without credit"):
        SGCDTrainer(world.model(), world.reward, GRPOConfig(**world.options(tmp_path)), data)
