"""Estimates a run's memory, by part, from its config and the model's config.json; docs/paper.md derives the parts.

No weights are read. Parameters are counted on the model, constructed on PyTorch's meta device, and the activations that
autograd saves are counted by running the model's layers on tensors with a shape but no data. So there is no table of
architectures to keep up to date.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.config import Config

GIB = 2**30
FP32, HALF = 4, 2  # bytes
WORKSPACE = 256 * 2**20  # the most that a kernel's gradient sweep holds beside inputs and gradients: docs/triton.md
LENGTHS = (128, 192, 256)  # tokens: a parabola through three points; several chunks of 64, as gated delta nets have


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd saves in one part's forward over a row of t tokens: fixed + linear t + square t^2.

    `fixed` are copies of weights in 16 bits (autocast); `square` is 0 unless attention materialises its matrix.
    """

    fixed: float = 0.0
    linear: float = 0.0
    square: float = 0.0

    def row(self, tokens: int) -> float:
        return self.linear * tokens + self.square * tokens**2


@dataclass(frozen=True)
class Facts:
    """A model as its config.json describes it."""

    parameters: int
    trained: int
    head: int  # V x H
    tied: bool  # embedding and head are one
    hidden: int
    layers: dict[str, int]  # kind -> how many
    kept: dict[str, Kept]  # kind -> of one layer; "outside" -> of what is no layer
    cache: int  # numbers that decoding remembers per token: keys and values of the layers with full attention
    state: int  # bytes that decoding remembers per sequence: states of recurrent layers


def facts(config: Config) -> Facts:
    """Read config.json in `model.path` and count the memory of the model that it describes.

    Raises:
        UserError: there is none, or transformers knows no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.learning.model import EAGER, lacks_sdpa

    path = Path(config.model.path)
    if not (path / "config.json").is_file():
        raise UserError(f"needs config.json in {path}; the file alone is enough")
    try:
        text = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"), _quiet():
            # eager: all models have it
            model = AutoModelForCausalLM.from_config(text, attn_implementation="eager", trust_remote_code=False)
            if config.model.lora:
                from trainer.learning import lora

                lora.add(model, config.model.lora)
        text = text.get_text_config()
        attention = "eager" if config.model.attn_implementation == "eager" else "sdpa"
        kept = count_kept(text, attention, computes_half(config))
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        if lacks_sdpa(error):
            raise UserError(f"model.attn_implementation: {path} has no sdpa; use {EAGER}") from None
        raise UserError(f"model.path: {path}/config.json: {' '.join(str(error).split())[:200]}") from None
    sizes = [p.numel() for p in model.parameters()]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    kinds = layer_kinds(text)
    head = model.get_output_embeddings().weight
    return Facts(
        sum(sizes),
        sum(trained),
        head.numel(),
        bool(text.tie_word_embeddings),
        head.shape[1],
        {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        kept,
        2 * head_numbers(text) * sum(kind != "linear_attention" for kind in kinds),
        state_bytes(text) * kinds.count("linear_attention"),
    )


def computes_half(config: Config) -> bool:
    """Whether a forward runs under bf16 autocast here."""
    from trainer.learning.model import fast_bf16

    return config.model.autocast == "bfloat16" or (config.model.autocast == "auto" and fast_bf16())


def layer_kinds(text: Any) -> list[str]:
    return list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)


def head_numbers(text: Any) -> int:
    """Numbers in one layer's keys of one token."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads))


def state_bytes(text: Any) -> int:
    """One gated delta layer's memory of a sequence: a state in fp32, and the convolution's last inputs in 16 bits."""
    if not hasattr(text, "linear_num_value_heads"):
        return 0
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    values = text.linear_num_value_heads * text.linear_value_head_dim
    convolved = (2 * keys + values) * (text.linear_conv_kernel_dim - 1)
    return int(values * text.linear_key_head_dim * FP32 + convolved * HALF)


def count_kept(text: Any, attention: str, half: bool) -> dict[str, Kept]:
    """What autograd keeps of one layer of each kind, and outside of layers, from forwards of tensors without data.

    Two layers of each kind are run: what the first keeps beyond the second (rotary tables) is kept once a forward.
    """
    kinds = list(dict.fromkeys(layer_kinds(text)))
    small = copy.deepcopy(text)
    small.num_hidden_layers = 2 * len(kinds)
    if getattr(text, "layer_types", None):
        small.layer_types = 2 * kinds
    found = [saved(small, tokens, attention, half) for tokens in LENGTHS]
    n = len(kinds)
    parts = {kind: [each[n + i] for _, each in found] for i, kind in enumerate(kinds)}
    outside = [rest + sum(each[:n]) - sum(each[n:]) for rest, each in found]
    return {part: _parabola(sizes) for part, sizes in {"outside": outside, **parts}.items()}


def saved(text: Any, tokens: int, attention: str, half: bool) -> tuple[int, list[int]]:
    """What `kept_by` finds in a model of `text` over a row of `tokens` tokens."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    if attention == "sdpa":
        attention = maskless()
    with FakeTensorMode(), _quiet():
        model = AutoModelForCausalLM.from_config(
            text, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )
        ids = torch.zeros((1, tokens), dtype=torch.long)
        return kept_by(model, ids, half)


def maskless() -> str:
    """The name of SDPA without a mask, registered with transformers.

    Over real rows its masks are none at all (`is_causal` says it), but it cannot see that in tensors without data, and
    would write one of tokens x tokens down.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    name = "sdpa_maskless"
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, lambda *arguments, **options: None)
    return name


def kept_by(model: Any, ids: torch.Tensor, half: bool = False) -> tuple[int, list[int]]:
    """Bytes that autograd keeps of `model`'s forward over `ids`: outside of layers, and of each layer.

    A storage is counted once, where it is kept first; parameters are not counted.
    """
    decoder = model.get_decoder()
    sizes, place = [0] * (len(decoder.layers) + 1), [0]
    seen, storages = {p.untyped_storage()._cdata for p in model.parameters()}, list[Any]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            storages.append(storage)  # held, so that no other can get its address
            sizes[place[0]] += storage.nbytes()
        return tensor

    hooks = []
    for number, layer in enumerate(decoder.layers, 1):
        hooks.append(layer.register_forward_pre_hook(lambda *_, number=number: place.__setitem__(0, number)))
        hooks.append(layer.register_forward_hook(lambda *_: place.__setitem__(0, 0)))
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            decoder(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes[0], sizes[1:]


def _parabola(sizes: list[int]) -> Kept:
    """Through three equally spaced points."""
    step, (a, b, c) = LENGTHS[1] - LENGTHS[0], sizes
    square = (c - 2 * b + a) / (2 * step**2)
    linear = (b - a) / step - square * (LENGTHS[0] + LENGTHS[1])
    return Kept(a - linear * LENGTHS[0] - square * LENGTHS[0] ** 2, linear, square)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' warnings of slow fallbacks: nothing is computed here."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class Part:
    """A line: what it is, how much, and where the figure comes from."""

    name: str
    size: float
    how: str


@dataclass(frozen=True)
class Memory:
    """Memory of the trainer's device, in bytes; `total` is the peak, not the sum of all parts."""

    lasting: list[Part]  # through the whole run
    passing: list[Part]  # in a training forward and backward
    total: float
    without_checkpointing: float  # what the forward would keep
    with_checkpointing: float


def memory(config: Config, model: Facts) -> Memory:
    """The trainer's peak memory: a micro-batch of rows of maximum length."""
    row = config.model.max_length
    rows = max(1, config.tokens_per_microbatch // row)
    tokens, count = rows * row, sum(model.layers.values())
    half = computes_half(config)
    copies = sum(model.kept[kind].fixed * n for kind, n in model.layers.items())
    every = sum(model.kept[kind].row(row) * n for kind, n in model.layers.items())
    layer = rows * max(model.kept[kind].row(row) for kind in model.layers)
    outside = rows * model.kept["outside"].row(row)
    borders = count * tokens * model.hidden * FP32
    plain, saving = rows * every + outside, borders + outside
    kept = saving if config.model.gradient_checkpointing else plain
    lasting = [
        Part("weights", FP32 * model.parameters, f"4 B x {model.parameters:,} parameters, fp32"),
        Part("gradients", FP32 * model.trained, f"4 B x {model.trained:,} trained"),
        Part("optimiser", 2 * FP32 * model.trained, "8 B x trained: Adam's two moments"),
    ]
    if config.engine.name == "hf":
        number = HALF if half else FP32
        size = config.engine.slots * (row * model.cache * number + model.state)
        lasting.append(Part("engine hf", size, f"{config.engine.slots} slots x {row:,} tokens, keys and values"))
    way = "its layers' inputs" if config.model.gradient_checkpointing else "all that autograd keeps"
    passing = [
        Part("bf16 copies", copies, "2 B x the layers' matrices, by autocast"),
        Part("activations", kept, f"{tokens:,} tokens x {kept / tokens / 1024:,.0f} KiB: {way}"),
        Part("one layer", layer, "recomputed in the backward" if kept == saving else "the teacher's forward"),
        Part("hidden states", 2 * tokens * model.hidden * FP32, "student's and teacher's, 4 B x tokens x H each"),
        Part(
            "kernels", WORKSPACE + FP32 * (tokens * model.hidden + model.head * (not config.model.lora)), "dW, dX, dZ"
        ),
    ]
    held = sum(p.size for p in lasting)
    copied, layered = passing[0].size, passing[2].size
    together = max(copied, layered) if config.model.gradient_checkpointing else copied + layered
    backward = together + sum(p.size for p in (passing[1], *passing[3:]))
    return Memory(
        lasting,
        [p for p in passing if p.size],
        held + max(backward, FP32 * model.trained),  # AdamW on a GPU makes one more copy of what it steps
        plain,
        saving,
    )


def size(n: float) -> str:
    """Bytes in a readable unit."""
    return f"{n / GIB:.1f} GiB" if n >= GIB else f"{n / 2**20:.1f} MiB"


def device() -> tuple[str, int]:
    """What the trainer would run on, and the bytes it has."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def engine_memory(config: Config, model: Facts) -> list[Part]:
    """One vLLM server's memory, if it is to hold every slot at full length (it queues what does not fit)."""
    slots, row = config.engine.slots, config.model.max_length
    weights = HALF * (model.parameters + model.head * model.tied)
    cache = slots * (row * HALF * model.cache + model.state)
    return [
        Part("weights", weights, "2 B x parameters, the head untied"),
        Part(
            "keys, values", cache, f"{slots} sequences x {row:,} tokens x {HALF * model.cache:,} B + {model.state:,} B"
        ),
    ]
