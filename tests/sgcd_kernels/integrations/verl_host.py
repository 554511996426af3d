"""The real verl on a CPU: its FSDP2 engine by its own registry, in one process and without Ray.

verl has no CPU platform, so one is put in through its platform plug-in point; nothing of its training path is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM
from verl.models.transformers import monkey_patch
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.config.actor import PolicyLossConfig

VOCAB = 64
# Of one task: three attempts, of different lengths, the first two with a tool's answer (mask 0) inside.
PROMPTS = [[1, 5, 9], [1, 5, 9, 13], [7, 2]]
RESPONSES = [[20, 21, 40, 41, 22, 2], [20, 31, 44, 2], [30, 31, 32, 33, 2]]
MASKS = [[1, 1, 0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1, 1]]
REFERENCE = [50, 51, 52, 53, 54]


class PlatformCPU(PlatformCUDA):
    """What verl asks of a device, answered by a CPU. The engine is looked up under VERL_ENGINE_DEVICE=cuda."""

    device_name = "cpu"
    vendor_name = "nvidia"
    device_module = torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def communication_backend_name(self) -> str:
        return "gloo"

    def empty_cache(self) -> None:
        pass


@contextmanager
def cpu_process(folder: Path, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """One of some gloo processes, and verl on its CPU."""
    platform_manager.set_platform(PlatformCPU())
    # Where TRL is installed verl patches a class that TRL 1.16 has no more; a value model is none of our business.
    monkey_patch.is_trl_available = lambda: False
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def save_tiny(folder: Path) -> Path:
    """A Llama whose distributions are far from flat, so that a reference makes a difference."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **sizes))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder)
    return folder


def engine_of(
    cls: type,
    path: Path,
    *,
    packed: bool,
    fused: bool = True,
    sgcd: dict[str, Any] | None = None,  # credit options
    hf: dict[str, Any] | None = None,  # what the model's config is changed to
) -> Any:
    """An engine of that class, made as verl's workers make theirs, and initialised."""
    model = HFModelConfig(
        path=str(path),
        load_tokenizer=False,
        use_remove_padding=packed,
        use_fused_kernels=fused,
        fused_kernel_options={"impl_backend": "torch", "sgcd": sgcd or {}},
        override_config={"attn_implementation": "sdpa"},
        enable_gradient_checkpointing=False,
    )
    for name, value in (hf or {}).items():
        setattr(model.hf_config, name, value)
    fp32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    config = FSDPEngineConfig(strategy="fsdp2", mixed_precision=fp32, use_torch_compile=False)
    optimizer = FSDPOptimizerConfig(lr=1e-3, total_training_steps=1)
    made = cls(model, config, optimizer, CheckpointConfig())
    stock = LlamaForCausalLM.forward
    try:
        made.initialize()
    finally:
        LlamaForCausalLM.forward = stock  # verl's own fused kernels patch the class, and so every later model
    return made


def actor_config(loss_mode: str) -> FSDPActorConfig:
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=3,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, dro_beta=0.1),
    )


def jagged(rows: list[Any], dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.as_tensor(row, dtype=dtype) for row in rows], layout=torch.jagged)


def batch(*, packed: bool, fused: bool = True, teacher: torch.Tensor | None = None, **options: Any) -> TensorDict:
    """Three rollouts as verl's trainer hands them to the actor: nested, without padding."""
    ids = [p + r for p, r in zip(PROMPTS, RESPONSES)]
    generator = torch.Generator().manual_seed(1)
    old = [torch.randn(len(r), generator=generator) * 0.1 - 4 for r in RESPONSES]
    advantages = [torch.full((len(r),), a) for r, a in zip(RESPONSES, (1.0, -0.7, 0.4))]
    tensors = {
        "input_ids": jagged(ids),
        "position_ids": jagged([range(len(row)) for row in ids]),
        "prompts": jagged(PROMPTS),
        "responses": jagged(RESPONSES),
        "response_mask": jagged(MASKS),
        "loss_mask": jagged(MASKS),
        "old_log_probs": jagged(old, torch.float32),
        "advantages": jagged(advantages, torch.float32),
    }
    if teacher is not None:
        tensors["teacher_input_ids"] = teacher
    made = tensordict_utils.get_tensordict(tensors)
    settings = {
        "temperature": 0.9,
        "global_batch_size": len(ids),
        "micro_batch_size_per_gpu": len(ids),
        "use_dynamic_bsz": False,
        "use_remove_padding": packed,
        "use_fused_kernels": fused,
        "calculate_entropy": True,
    }
    return tensordict_utils.assign_non_tensor(made, **settings | options)
