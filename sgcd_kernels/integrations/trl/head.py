"""A causal LM whose forward may end in these kernels instead of its logits.

TRL puts a fused head on the model that it trains (`model(..., labels=labels, fused_lm_head=True)` returns per-token
log-probs). `LinearHead` wraps it, computes the same call by `linear_logprob`, and can stop at the hidden states. It
replaces the model's forward, so that DDP, FSDP2 and peft wrap it like any other, and passes on every other call.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from transformers.modeling_outputs import CausalLMOutput
from trl.trainer.utils import FusedCausalLMOutput

from sgcd_kernels import LogprobStats, OutputHead, linear_logprob, output_head

IGNORED = -100


class Unprojected:
    """Logits that were not computed: the hidden states, and the head to be applied to them."""

    def __init__(
        self,
        hidden: Tensor,  # [B, L, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        softcap: float | None,
        temperature: float = 1.0,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.softcap, self.temperature = softcap, temperature

    def __getitem__(self, key: Any) -> Unprojected:
        """Index as logits: batch, position and, only as a full slice, vocabulary."""
        assert not isinstance(key, tuple) or len(key) < 3 or key[2:] == (slice(None),), key
        return Unprojected(self.hidden[key], self.weight, self.bias, self.softcap, self.temperature)

    def __truediv__(self, temperature: float) -> Unprojected:
        return Unprojected(self.hidden, self.weight, self.bias, self.softcap, self.temperature * float(temperature))

    def sum(self) -> Tensor:
        """Any scalar in the same graph: TRL multiplies the sum by 0 if a batch has no loss tokens."""
        return self.hidden.sum()

    def logprob(self, targets: Tensor) -> LogprobStats:  # [B, L]
        """log p(targets), entropy and normaliser; targets of -100 are not computed and give 0."""
        return linear_logprob(
            self.hidden,
            self.weight,
            targets,
            bias=self.bias,
            temperature=self.temperature,
            softcap=self.softcap,
            ignore_index=IGNORED,
        )


def unproject(
    hidden: Tensor,  # [B, L, H]
    weight: Tensor,  # [V, H], or FSDP2's shard of it
    bias: Tensor | None,  # [V]
    scale: float = 1.0,
    softcap: float | None = None,
    fp32: bool = False,
) -> Unprojected:
    """softcap(scale (hidden weight^T + bias)) in the dtype in which TRL's own head would compute it."""
    weight, bias = whole(weight), None if bias is None else whole(bias)
    hidden = hidden.to(weight.device)
    dtype = hidden.dtype
    if fp32:
        dtype = torch.float32
    elif torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if scale != 1.0:
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    return Unprojected(hidden, weight, bias, softcap)


class LinearHead:
    """The head of one causal LM (the transformers model itself, without wrappers).

    With a `temperature` it replaces TRL's fused head, which otherwise stays in use; `fp32` is TRL's
    `cast_lm_head_to_fp32`. Raises ValueError as `output_head` does.
    """

    def __init__(self, model: Any, temperature: float | None = None, fp32: bool = False) -> None:
        self.model, self.temperature, self.fp32 = model, temperature, fp32
        self.head = measure_head(model)
        self._lazy = False
        self._observer: Callable[[Unprojected], None] | None = None
        original = model.forward

        @functools.wraps(type(model).forward)  # `generate` looks at the signature
        def forward(_: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("fused_lm_head", False) and self.temperature is not None:
                return self._fused(self.temperature, *args, **kwargs)
            if self._lazy:
                return CausalLMOutput(logits=self._unprojected(*args, **kwargs)[0])
            return original(*args, **kwargs)

        model.forward = types.MethodType(forward, model)

    @contextmanager
    def lazily(self) -> Iterator[None]:
        """Inside, the model's `logits` are `Unprojected`."""
        before, self._lazy = self._lazy, True
        try:
            yield
        finally:
            self._lazy = before

    @contextmanager
    def observed_by(self, observer: Callable[[Unprojected], None]) -> Iterator[None]:
        """Inside, `observer` is called with the input of every fused forward's head, before its log-probs return."""
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def _fused(
        self, temperature: float, *args: Any, labels: Tensor, fused_lm_head: bool, **kwargs: Any
    ) -> FusedCausalLMOutput:
        """The result of TRL's fused head, for its GRPO trainer: fields [B, L - 1], 0 where the next label is -100."""
        found, aux_loss = self._unprojected(*args, **kwargs)
        scored = found[:, :-1] / temperature
        targets = labels[:, 1:].to(scored.hidden.device)
        if self._observer is not None:
            self._observer(scored)
        stats = scored.logprob(targets)
        return FusedCausalLMOutput(
            log_probs=stats.logp, entropy=stats.entropy, label_mask=targets != IGNORED, aux_loss=aux_loss
        )

    def _unprojected(self, *args: Any, logits_to_keep: int = 0, **kwargs: Any) -> tuple[Unprojected, Tensor | None]:
        """(the last `logits_to_keep` positions' hidden states and head, or all; the load-balancing loss of MoE)"""
        outputs = self.model.base_model(*args, **{**kwargs, "use_cache": False})
        states, head = outputs.last_hidden_state[:, -logits_to_keep:], self.head
        found = unproject(states, head.weight, head.options()["bias"], head.scale, head.softcap, self.fp32)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = balance_loss(self.model, outputs.router_logits, kwargs.get("attention_mask"))
        return found, aux_loss


def measure_head(model: Any) -> OutputHead:
    """The head as it follows `base_model`, which is what TRL runs. Raises ValueError as `output_head` does."""
    return output_head(model, decoder=model.base_model)


def balance_loss(model: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts (arXiv 2101.03961), as transformers defines it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    loss: Tensor = load_balancing_loss_func(
        router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )
    return loss


def whole(weight: Tensor) -> Tensor:
    """Gather a parameter that FSDP2 has sharded; its gradient is reduced to the shards.

    Processes have different tokens, so the gradients are declared as terms of a mean: otherwise each rank would keep
    its slice of its local gradient. (In FSDP's root group the weight is gathered already, and FSDP takes the mean.)
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
