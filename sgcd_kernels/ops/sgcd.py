"""SGCD in one call: score student and teacher, turn divergence into credit, compute the weighted policy loss.

`sgcd_loss` takes plain keywords. Its two halves, `score_and_weigh` and `weighted_policy_loss`, take bundles: they are
for training loops that need the credit of each token, or that have a loss of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import Unpack  # a dependency of torch; in `typing` from 3.11

from sgcd_kernels.backends.protocol import IMPLS, DivergenceOptions
from sgcd_kernels.backends.registry import backend_status
from sgcd_kernels.core.surrogate import PolicyLossConfig
from sgcd_kernels.core.validation import (
    NUMBERS,
    SMALLEST,
    check_choice,
    check_float,
    check_int,
    check_numeric,
    check_tensor,
    shown,
)
from sgcd_kernels.credit.config import DEFAULT, CreditConfig, check_config
from sgcd_kernels.credit.rules import Credit, never_acts
from sgcd_kernels.credit.summary import CreditSums, credit_summary
from sgcd_kernels.credit.weights import CreditSignals, config_for_op, credit_op
from sgcd_kernels.ops.divergence import DivergenceStats, divergence_op, teacher_head
from sgcd_kernels.ops.policy_inputs import PolicyOptions, PolicyTokens, Settings, check_policy_inputs
from sgcd_kernels.ops.policy_loss import KnownLse, policy_loss
from sgcd_kernels.ops.sgcd_batch import CreditInputs, Teacher, batch_op, check_credit_inputs, masked_mean_op, weigh_op


class SGCDOptions(PolicyOptions, total=False):
    """Keywords that `sgcd_loss` hands to `linear_policy_loss`."""

    old_logp: Tensor | None  # like targets
    ref_logp: Tensor | None  # like targets
    importance_weights: Tensor | None  # like targets


def sgcd_loss(
    hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    teacher_hidden: Tensor | None,  # [N, H'] or [B, T, H']
    advantages: Tensor,  # like targets, or [B]
    cu_seqlens: Tensor | None = None,  # [B + 1], for packed hidden
    mask: Tensor | None = None,  # like targets; true where a token has a loss
    *,
    has_teacher: Tensor | None = None,  # like targets, or [B]; None is everywhere
    credit_mask: Tensor | None = None,  # like targets; true where a loss token may carry credit
    turn_ids: Tensor | None = None,  # like targets
    teacher_weight: Tensor | None = None,  # [V, H']
    teacher_bias: Tensor | None = None,  # [V]
    config: CreditConfig = DEFAULT,
    reuse_lse: bool = True,
    **options: Unpack[SGCDOptions],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_policy_loss` with advantages A W, W from `credit_weights` of `linear_divergence` (arXiv 2606.12634).

    Further keywords are those of `linear_policy_loss`: loss_type, epsilon, epsilon_high, beta, num_items_in_batch,
    old_logp, ref_logp, importance_weights, temperature, bias, softcap, ignore_index, impl, group.

    The teacher is the same policy given the credit reference, aligned token by token with the student: row i of
    `teacher_hidden` predicts target i too. It is scored, never trained. `has_teacher` marks the tokens or sequences
    that have one; elsewhere `teacher_hidden` is not read and W = 1. `credit_mask` leaves out masked literals (tokens
    that spell an answer), which keep W = 1.

    If credit cannot act (rule "none", gamma 0, no `teacher_hidden`), nothing is scored: loss, gradients and cost are
    those of `linear_policy_loss`, bit for bit. Otherwise the loss reuses the log-sum-exps of the scoring pass, which
    saves one of six products and may change the last bit. They are recomputed with `reuse_lse=False`, and in a batch
    in which every W is 1: its loss equals `linear_policy_loss` bit for bit too.

    A span of credit ends with its turn. Without `turn_ids` each run of consecutive loss tokens is a turn, so that no
    span crosses a tool's output. Give `turn_ids` if `hidden` holds generated tokens only, because their runs touch.

    Metrics are those of the policy loss, `entropy`, and, over eligible tokens, `credit/*`: mean_divergence,
    mean_weight, frac_salient (s > 0), frac_saturated (W at its ceiling), num_spans, mean_span_length, teacher_entropy
    and inert (1, with a RuntimeWarning, if every d is 0 or every W is 1). With no eligible token mean_weight is 1 and
    inert 0. If nothing is scored, there are no `credit/*`.

    Gradients: hidden, weight, bias
    Backends: triton, cpp, torch
    Cost: 5 U forward, 0 U backward; with reuse_lse=False 6 U forward, 0 U backward

    Raises ValueError as its three ops do.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> hidden, teacher, weight = (torch.randn(n, 4, generator=g) for n in (6, 6, 10))
    >>> targets, cu_seqlens = torch.randint(10, (6,), generator=g), torch.tensor([0, 3, 6])
    >>> advantages = torch.tensor([1.0, -1.0])  # one per sequence
    >>> turn_ids = torch.tensor([0, 0, 1, 0, 0, 0])
    >>> batch = (hidden.requires_grad_(), weight, targets, teacher, advantages, cu_seqlens)
    >>> loss, metrics = sgcd_loss(*batch, turn_ids=turn_ids)
    >>> loss.backward()
    >>> bool(metrics["credit/mean_weight"] > 1), metrics["credit/inert"].item()
    (True, 0.0)
    """
    named: dict[str, Any] = dict(options)
    per_token = {name: named.pop(name, None) for name in _PER_TOKEN}
    settings = Settings.of("sgcd_loss", weight, named)
    tokens = PolicyTokens(targets, advantages, mask=mask, cu_seqlens=cu_seqlens, **per_token)
    teacher = Teacher(teacher_hidden, teacher_head(settings.head, teacher_weight, teacher_bias), has_teacher)
    if not isinstance(reuse_lse, bool):
        raise ValueError(f"reuse_lse is {shown(reuse_lse)}, needs True or False")
    scored = score_and_weigh(hidden, settings, tokens, CreditInputs(teacher, credit_mask, turn_ids, config))
    result = weighted_policy_loss(hidden, settings, tokens, scored, reuse_lse=reuse_lse)
    return result.loss, result.metrics


_PER_TOKEN = ("old_logp", "ref_logp", "importance_weights")


class SGCDTokens(NamedTuple):
    """Per token, like `targets`, without gradients. Tokens without a loss are 0, with W = 1 and span -1.

    At a token without a teacher, the teacher's log-prob and entropy are the student's: d = 0, W = 1.
    """

    student_logp: Tensor
    teacher_logp: Tensor
    student_entropy: Tensor  # nats
    teacher_entropy: Tensor  # nats
    divergence: Tensor  # d = KL(student || teacher), nats
    weights: Tensor  # W
    saliency: Tensor  # s
    span_ids: Tensor  # int64


class SGCDResult(NamedTuple):
    loss: Tensor
    metrics: dict[str, Tensor]
    tokens: SGCDTokens


class Scored(NamedTuple):
    """Statistics of student and teacher, and the credit computed from them; per token, like `targets`."""

    targets: Tensor  # int64, `ignore_index` where masked
    advantages: Tensor  # A W
    has_teacher: Tensor  # bool: a loss token with a teacher; the fields below are blank elsewhere
    stats: DivergenceStats
    lse_low: Tensor  # what rounding took from stats.student_lse
    credit: Credit
    lse_known: Tensor  # bool: the policy loss may reuse stats.student_lse
    sums: CreditSums

    def tokens(self, logp: Tensor, entropy: Tensor | None) -> SGCDTokens:
        """The values of all tokens, given the student's log-probs and entropies of those without a teacher."""
        own = torch.zeros_like(logp) if entropy is None else entropy
        at, stats = self.has_teacher, self.stats
        return SGCDTokens(
            torch.where(at, stats.student_logp, logp),
            torch.where(at, stats.teacher_logp, logp),
            torch.where(at, stats.student_entropy, own),
            torch.where(at, stats.teacher_entropy, own),
            stats.reverse_kl,
            *self.credit,
        )


def weighted_policy_loss(
    hidden: Tensor,  # [N, H] or [B, T, H]
    settings: Settings,
    tokens: PolicyTokens,
    scored: Scored | None,
    *,
    reuse_lse: bool = True,
) -> SGCDResult:
    """The policy loss with the weighted advantages, or with those of `tokens` if nothing was scored."""
    check_policy_inputs(hidden, tokens, settings)
    if scored is None:
        result = policy_loss(hidden, tokens, settings, KnownLse())
        assert result.entropy is not None
        return SGCDResult(result.loss, result.metrics.named(), unscored_tokens(result.logp, result.entropy))
    tokens = tokens._replace(targets=scored.targets, advantages=scored.advantages, mask=None)
    known = KnownLse(scored.stats.student_lse, scored.lse_low, scored.lse_known) if reuse_lse else KnownLse()
    result = policy_loss(hidden, tokens, settings, known)
    per_token = scored.tokens(result.logp, result.entropy)
    loss_tokens = scored.targets != settings.ignore_index
    entropy = masked_mean_op(per_token.student_entropy, loss_tokens)
    # An fp64 teacher makes statistics fp64, and nothing else.
    of_scores = {"entropy": entropy} | credit_summary(scored.sums)
    metrics = result.metrics.named() | {name: x.to(result.loss.dtype) for name, x in of_scores.items()}
    return SGCDResult(result.loss, metrics, per_token)


@torch.no_grad()
def score_and_weigh(hidden: Tensor, settings: Settings, tokens: PolicyTokens, inputs: CreditInputs) -> Scored | None:
    """Divergences, credit and weighted advantages. None, without scoring, if credit cannot act."""
    check_policy_inputs(hidden, tokens, settings)
    check_credit_inputs(hidden, settings, tokens, inputs)
    teacher, config, shape = inputs.teacher, inputs.config, tokens.targets.shape
    if teacher.hidden is None or never_acts(config):
        return None
    bounds = tokens.cu_seqlens
    if bounds is None:
        bounds = torch.arange(shape[0] + 1) * shape[1]
    batch = batch_op(settings.head, tokens, inputs.credit_mask, teacher.has_teacher, settings.ignore_index)
    sides = hidden.detach(), settings.head, teacher.hidden.detach(), teacher.head
    options = DivergenceOptions()
    stats, low = divergence_op(*sides, batch.scored_targets, settings.ignore_index, options, settings.impl)
    signals = CreditSignals(
        stats.reverse_kl.reshape(-1),
        stats.teacher_entropy.reshape(-1),
        batch.advantages.reshape(-1),
        (stats.teacher_logp - stats.student_logp).reshape(-1),
        stats.forward_kl.reshape(-1),
        stats.bhattacharyya.reshape(-1),
        stats.student_entropy.reshape(-1),
    )
    origin = ", computed from hidden and teacher_hidden,"
    turns = batch.runs if inputs.turn_ids is None else inputs.turn_ids.reshape(-1)
    credit = credit_op(signals, bounds, batch.eligible.reshape(-1), turns, config_for_op(config), settings.impl, origin)
    credit = Credit(*(x.reshape(shape) for x in credit))
    weighed = weigh_op(batch, credit, stats.reverse_kl, stats.teacher_entropy, config.clip, inputs.warn)
    return Scored(
        batch.targets, weighed.advantages, batch.has_teacher, stats, low, credit, weighed.lse_known, weighed.sums
    )


def unscored_tokens(logp: Tensor, entropy: Tensor) -> SGCDTokens:
    """The `SGCDTokens` of a batch without teachers."""
    zeros = torch.zeros_like(logp)
    ids = torch.full_like(logp, -1, dtype=torch.long)
    return SGCDTokens(logp, logp, entropy, entropy, zeros, zeros + 1, zeros, ids)


class Hyperparameters(TypedDict, total=False):
    """What `FusedLinearSGCDLoss` binds; defaults and meaning as in `sgcd_loss`."""

    config: CreditConfig
    loss_type: str
    epsilon: float
    epsilon_high: float | None
    beta: float
    temperature: float | Tensor
    softcap: float | None
    ignore_index: int
    reuse_lse: bool
    impl: str
    group: ProcessGroup | None


_BOUND: dict[str, Any] = {
    "config": DEFAULT,
    **{name: getattr(PolicyLossConfig(), name) for name in ("loss_type", "epsilon", "epsilon_high", "beta")},
    "temperature": 1.0,
    "softcap": None,
    "ignore_index": -100,
    "reuse_lse": True,
    "impl": "auto",
    "group": None,
}


class FusedLinearSGCDLoss(nn.Module):
    """`sgcd_loss` with its hyperparameters bound: `FusedLinearSGCDLoss(loss_type="dapo")(hidden, lm_weight, ...)`.

    Takes config, loss_type, epsilon, epsilon_high, beta, temperature, softcap, ignore_index, reuse_lse, impl and group.
    Each is an attribute, which may be set between calls: `criterion.temperature = 0.8`.

    Its constructor raises ValueError for an unknown name, an invalid value, or a backend that cannot run on this
    machine. `check_model` refuses models that it cannot be used with.

    >>> import torch
    >>> criterion = FusedLinearSGCDLoss(config=CreditConfig(d_floor=1e-3), loss_type="dapo", epsilon_high=0.28)
    >>> g = torch.Generator().manual_seed(0)
    >>> hidden, teacher, weight = (torch.randn(n, 8, generator=g) for n in (6, 6, 32))  # 2 sequences, 3 tokens each
    >>> hidden.requires_grad_() is hidden
    True
    >>> targets, advantages = torch.randint(32, (6,), generator=g), torch.tensor([1.0, -1.0])
    >>> loss, metrics = criterion(hidden, weight, targets, teacher, advantages, torch.tensor([0, 3, 6]))
    >>> loss.backward()
    >>> hidden.grad.shape, bool(metrics["credit/mean_weight"] > 1)
    (torch.Size([6, 8]), True)
    """

    def __init__(self, **hyperparameters: Unpack[Hyperparameters]) -> None:
        super().__init__()
        for name in hyperparameters:
            check_choice("hyperparameter", name, tuple(_BOUND))
        for name, value in (_BOUND | dict(hyperparameters)).items():
            setattr(self, name, value)
        _check_bound(self.bound())

    def forward(
        self,
        hidden: Tensor,  # [N, H] or [B, T, H]
        lm_weight: Tensor,  # [V, H]
        targets: Tensor,  # [N] or [B, T]
        teacher_hidden: Tensor | None,  # [N, H'] or [B, T, H']
        advantages: Tensor,  # like targets, or [B]
        cu_seqlens: Tensor | None = None,  # [B + 1]
        mask: Tensor | None = None,  # like targets
        **inputs: Unpack[Inputs],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics); `inputs` are the other tensors of `sgcd_loss`: bias, old_logp, has_teacher, turn_ids, ..."""
        return sgcd_loss(
            hidden, lm_weight, targets, teacher_hidden, advantages, cu_seqlens, mask, **inputs, **self.bound()
        )

    if TYPE_CHECKING:
        __call__ = forward  # for type checkers: nn.Module's takes and returns Any

    def bound(self) -> dict[str, Any]:
        """Every hyperparameter by name, defaults included."""
        return {name: getattr(self, name) for name in _BOUND}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.bound().items())


class Inputs(TypedDict, total=False):
    """The further tensors of a call; shapes as in `sgcd_loss`."""

    has_teacher: Tensor | None
    credit_mask: Tensor | None
    turn_ids: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    old_logp: Tensor | None
    ref_logp: Tensor | None
    importance_weights: Tensor | None
    bias: Tensor | None
    num_items_in_batch: float | Tensor | None


def _check_bound(values: dict[str, Any]) -> None:
    check_config(values["config"])
    PolicyLossConfig(**{name: values[name] for name in ("loss_type", "epsilon", "epsilon_high", "beta")})
    temperature = values["temperature"]
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        check_tensor("temperature", temperature)  # its shape must fit each batch
        check_numeric("temperature", temperature, NUMBERS)
    else:
        check_float("temperature", temperature, SMALLEST)
    if values["softcap"] is not None:
        check_float("softcap", values["softcap"], SMALLEST)
    check_int("ignore_index", values["ignore_index"])
    if not isinstance(values["reuse_lse"], bool):
        raise ValueError(f"reuse_lse is {shown(values['reuse_lse'])}, needs True or False")
    if values["group"] is not None and not isinstance(values["group"], ProcessGroup):
        raise ValueError(f"group is {shown(values['group'])}, needs a torch.distributed.ProcessGroup or None")
    check_choice("impl", values["impl"], IMPLS)
    if values["impl"] != "auto" and not (status := backend_status()[values["impl"]]).usable:
        raise ValueError(
            f"impl is {values['impl']!r}, which cannot run here: {status.reason}; needs another, or 'auto'"
        )
