"""The policy: a Hugging Face folder on this machine, and the two parts of it that the trainer touches.

The trainer never calls the model's own head: hidden states come from the decoder and go to `sgcd_kernels` together
with what `output_head` measured of the head, so that no [tokens, vocabulary] matrix exists.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgcd_kernels import output_head
from trainer.errors import UserError
from trainer.learning import lora
from trainer.optional_packages import need
from trainer.protocols import Renderer
from trainer.records import checkpoint_folder

EAGER = "--model.attn_implementation eager"

if TYPE_CHECKING:
    from trainer.config import ModelConfig

log = logging.getLogger(__name__)


def load(config: ModelConfig) -> tuple[Any, Any, Renderer]:
    """Load (model, tokenizer, renderer) from the folder `config.path`; nothing is ever downloaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as theirs

    from trainer import chat
    from trainer.chat import stop_tokens

    check_folder(config)
    theirs.disable_progress_bar()  # reading a shard takes no time worth a bar
    verbosity = theirs.get_verbosity()
    theirs.set_verbosity_error()  # its report on a folder that does not fit; ours is one line
    folder = Path(config.path)
    if own_code(folder):
        log.warning("model.path: %s brings Python code of its own (auto_map), which is not run", config.path)
    options = {"local_files_only": True, "trust_remote_code": False, "attn_implementation": config.attn_implementation}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # whatever transformers, tokenizers and safetensors make of a folder that does not fit
        raise UserError(_cannot_load(config, error)) from error
    finally:
        theirs.set_verbosity(verbosity)
    _check_whole(config.path, found)
    if config.use_liger_kernel:
        _use_liger(model)
    if config.lora:
        lora.add(model, config.lora)
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    _check_head(config.path, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.autocast == "bfloat16" or (config.autocast == "auto" and fast_bf16()):
        compute_in_bf16(model.get_decoder())
    if config.gradient_checkpointing:
        recompute_layers(model)
    model.to(device).eval()  # dropout stays off: the policy that is trained is the one that was sampled
    ends = stop_tokens.of_model(model, tokenizer)
    return model, tokenizer, chat.load(config.renderer, tokenizer, config.chat_template_kwargs, ends)


def check_folder(config: ModelConfig) -> None:
    """Refuse a folder that holds no model, and options that this machine cannot compute; loads nothing.

    Raises:
        UserError: which, and what to do.
    """
    folder = Path(config.path)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise UserError(f"model.path: {config.path} {what}; {remedy(config)}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(f"model.path: {config.path} has a config.json and no weights; {remedy(config)}")
    if checkpoint_folder.is_sealed(folder):
        checkpoint_folder.verify(folder)
    _check_kernels(config)


def own_code(folder: Path) -> bool:
    """Whether a model folder names code of its own (`auto_map`), which transformers would run if it were trusted."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            if json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map"):
                return True
        except (OSError, ValueError, AttributeError, RecursionError):  # reported where the file is needed
            continue
    return False


def remedy(config: ModelConfig) -> str:
    """What to do about a model that is missing."""
    if config.made_by:
        return f"run: {config.made_by}"
    return "give a Hugging Face model folder on this machine: --model.path FOLDER"


def _check_kernels(config: ModelConfig) -> None:
    """Refuse what needs a GPU, a package or bf16 that is not there: in one line, and before the first forward."""
    flash = config.attn_implementation.startswith("flash_attention")
    for key, value, wanted in (
        ("attn_implementation", config.attn_implementation, flash),
        ("use_liger_kernel", True, config.use_liger_kernel),
    ):
        if wanted and not torch.cuda.is_available():
            other = "sdpa" if flash else "false"
            raise UserError(f"model.{key}: {value} needs a GPU, and PyTorch sees none; use --model.{key} {other}")
    if flash and config.autocast == "off":
        raise UserError(
            f"model.attn_implementation: {config.attn_implementation} computes in 16 bits only; use --model.autocast "
            "bfloat16, or --model.attn_implementation sdpa"
        )
    if config.attn_implementation == "flash_attention_2":
        need("flash_attn")
    if config.use_liger_kernel:
        need("liger_kernel")


def _use_liger(model: Any) -> None:
    """Liger's layers in place of the model's own; its losses stay out, for the head is ours."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"model.use_liger_kernel: Liger has no layers for {model.config.model_type}; "
            "use --model.use_liger_kernel false"
        )
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def lacks_sdpa(error: Exception) -> bool:
    """Whether transformers says that a model has no sdpa: a few have only eager attention (Gemma 2)."""
    return "scaled_dot_product_attention" in str(error)


def _cannot_load(config: ModelConfig, error: Exception) -> str:
    """What failed, under the key to blame."""
    if own_code(Path(config.path)):
        return (
            f"model.path: {config.path} needs Python code of its own (auto_map), which is not run; give another model"
        )
    reason, kind = " ".join(str(error).split())[:300], config.attn_implementation
    if lacks_sdpa(error):
        return f"model.attn_implementation: {config.path} has no sdpa; use {EAGER}"
    if "attn_implementation" in reason or (isinstance(error, ImportError) and kind not in ("sdpa", "eager")):
        return f"model.attn_implementation: cannot load {config.path} with {kind!r}; {EAGER} always works ({reason})"
    return f"model.path: cannot load {config.path} ({reason})"


def _check_head(path: str, model: Any) -> None:
    """Refuse a model whose logits `sgcd_kernels` cannot compute: engine and trainer would agree on wrong log-probs."""
    try:
        output_head(model)
    except ValueError as error:
        raise UserError(f"model.path: {path} cannot be trained: {error}") from error


def _check_whole(path: str, found: dict[str, Any]) -> None:
    """Refuse a folder whose tensors are not the model's: transformers would fill the gaps with random numbers."""
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "has, and its config.json does not know,")):
        if found[key]:
            names = sorted(found[key])
            raise UserError(f"model.path: {path} {what} {names[0]} ({len(names)} such tensors); give a whole model")
    if found["mismatched_keys"]:
        name, stored, wanted = sorted(found["mismatched_keys"])[0]
        raise UserError(
            f"model.path: {path} has {name} as {list(stored)}, its config.json says {list(wanted)}; give a whole model"
        )


def layer_kinds(model: Any) -> set[str]:
    """The kinds of the decoder's layers, by transformers' names: full_attention, linear_attention, ..."""
    config = model.config.get_text_config()
    if kinds := getattr(config, "layer_types", None):
        return set(kinds)
    if getattr(model, "_is_stateful", False):
        return {f"{config.model_type} state"}
    return {"sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 in hardware; a CPU that does not emulates it, slower than fp32."""
    if torch.cuda.is_available():
        return True
    info = Path("/proc/cpuinfo")
    return info.is_file() and any(flag in info.read_text() for flag in ("amx_bf16", "avx512_bf16"))


def compute_in_bf16(decoder: torch.nn.Module) -> None:
    """Let every forward of `decoder` run under bf16 autocast: its weights, and what an optimiser adds, stay fp32.

    Hooks rather than a wrapper, so that engine and trainer, which call the decoder each in its own way, agree.
    """
    running: list[torch.autocast] = []

    def enter(module: torch.nn.Module, arguments: Any) -> None:
        running.append(torch.autocast(next(module.parameters()).device.type, torch.bfloat16))
        running[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        running.pop().__exit__(None, None, None)

    decoder.register_forward_pre_hook(enter)
    decoder.register_forward_hook(leave, always_call=True)


def hidden_states(model: Any, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, H]
    """The decoder's last hidden states of right-padded rows.

    No attention mask: under causal attention a token sees only what is to its left, and padding is to the right of
    everything real. So the kernels take their fast causal path and every real token's state is that of its own row.
    """
    with _recomputing(model):
        states: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return states


def recompute_layers(model: Any) -> None:
    """Let training forwards keep each layer's input alone; the backward computes the layer again, to the same bits."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable()
    except ValueError as error:
        raise UserError(
            f"model.gradient_checkpointing: {type(model).__name__} cannot recompute its layers ({error}); "
            "use --model.gradient_checkpointing false"
        ) from None


@contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    """Put the layers that are to be recomputed, and nothing inside them, into training mode for one forward.

    transformers recomputes layers in that mode and takes their caches away, so an engine must never meet one in it;
    and dropout, which is inside, stays off.
    """
    marked = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    layers = marked if torch.is_grad_enabled() else []
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
