"""The arguments of the policy losses as bundles: the head and the options, and a batch of tokens, with their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.backends.protocol import IMPLS
from sgcd_kernels.core.lm_head import LMHead
from sgcd_kernels.core.surrogate import PER_SEQUENCE, PolicyLossConfig
from sgcd_kernels.core.validation import (
    check_all_per_token,
    check_beside,
    check_choice,
    check_cu_seqlens,
    check_head,
    check_int,
    check_per_token_or_sequence,
    check_targets,
    shown,
)


class HeadOptions(TypedDict, total=False):
    """Keywords about the head (fields of `LMHead`), ignored targets and the backend."""

    bias: Tensor | None  # [V]
    softcap: float | None
    temperature: float | Tensor  # a number, or per token
    group: ProcessGroup | None
    ignore_index: int
    impl: str


class PolicyOptions(HeadOptions, total=False):
    """Keywords about the loss: fields of `PolicyLossConfig`, or `policy`, whose fields the other keywords override."""

    policy: PolicyLossConfig
    loss_type: str
    epsilon: float
    epsilon_high: float | None
    beta: float
    num_items_in_batch: float | Tensor | None


class Settings(NamedTuple):
    """The checked keywords of a policy loss."""

    head: LMHead
    policy: PolicyLossConfig
    ignore_index: int
    impl: str

    @staticmethod
    def of(function: str, weight: Tensor, options: Mapping[str, Any]) -> Settings:
        """From the keywords that `function` was called with. An unknown one is a TypeError, as in any call."""
        left = dict(options)
        policy = left.pop("policy", _POLICY)
        if not isinstance(policy, PolicyLossConfig):
            raise ValueError(f"policy is {shown(policy)} ({type(policy).__name__}), needs a PolicyLossConfig")
        fields_of_policy = {name: left.pop(name, getattr(policy, name)) for name in _POLICY_FIELDS}
        head = {name: left.pop(name) for name in _HEAD_FIELDS if name in left}
        ignore_index, impl = left.pop("ignore_index", -100), left.pop("impl", "auto")
        if left:
            raise TypeError(f"{function}() got an unexpected keyword argument {next(iter(left))!r}")
        check_choice("impl", impl, IMPLS)
        check_int("ignore_index", ignore_index)
        return Settings(LMHead(weight, **head), PolicyLossConfig(**fields_of_policy), ignore_index, impl)


_POLICY = PolicyLossConfig()
_POLICY_FIELDS = tuple(field.name for field in fields(PolicyLossConfig))
_HEAD_FIELDS = tuple(field.name for field in fields(LMHead) if field.name != "weight")


class PolicyTokens(NamedTuple):
    """The tensors of a batch; shaped like `targets` unless noted."""

    targets: Tensor  # [N] or [B, T]
    advantages: Tensor  # or [B]
    old_logp: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None  # [B + 1]
    ref_logp: Tensor | None = None
    importance_weights: Tensor | None = None


def check_policy_inputs(hidden: Tensor, tokens: PolicyTokens, settings: Settings) -> torch.Size:
    """Refuse shapes, dtypes and devices that do not fit, and a missing ref_logp; return the leading shape."""
    policy = settings.policy
    if policy.has_kl and tokens.ref_logp is None:
        raise ValueError(f"ref_logp is None, needs the reference policy's log-probs for beta {policy.beta}")
    leading, like = check_head(hidden, settings.head), ("hidden", hidden)
    check_targets(tokens.targets, leading, hidden.device, tokens.mask)
    sequences = check_sequences(hidden, tokens.cu_seqlens, policy.loss_type)
    check_per_token_or_sequence("advantages", tokens.advantages, leading, sequences, like)
    for name in _POLICY_FIELDS:
        check_beside(name, getattr(policy, name), *like)
    per_token = {name: getattr(tokens, name) for name in ("old_logp", "ref_logp", "importance_weights")}
    check_all_per_token(per_token, leading, hidden.device)
    return leading


def check_sequences(hidden: Tensor, cu_seqlens: Tensor | None, loss_type: str) -> int:
    """Refuse `cu_seqlens` that are missing, or given with [B, T, H]; return the number of sequences."""
    leading = hidden.shape[:-1]
    if len(leading) == 2:
        if cu_seqlens is not None:
            raise ValueError(f"cu_seqlens is given with hidden [B, T, H], T = {leading[1]}; needs packed hidden [N, H]")
        return leading[0]
    if cu_seqlens is None:
        if loss_type in PER_SEQUENCE:
            raise ValueError(f"cu_seqlens is None, needs [B + 1] for loss_type {loss_type!r} on packed hidden [N, H]")
        return 1
    check_cu_seqlens(cu_seqlens, "hidden", hidden)
    return cu_seqlens.numel() - 1
