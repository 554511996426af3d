"""Seeded calls of every public function of `sgcd_kernels`, for `scripts/result_bits.py`.

Only public names are used, so that the same calls run before and after a change of the internals. An option whose value
is "@name" stands for the tensor `name` of the call's `Batch`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sgcd_kernels import (
    CreditConfig,
    FusedLinearSGCDLoss,
    backend_status,
    credit_weights,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)
from sgcd_kernels.integrations.cut_cross_entropy import linear_cross_entropy
from sgcd_kernels.integrations.liger import LigerFusedLinearGRPOLoss, LigerFusedLinearSGCDLoss

Options = Mapping[str, Any]
Outputs = dict[str, Tensor]
Case = tuple[str, Callable[[], Outputs]]
Shape = tuple[tuple[int, ...], int, int]  # leading dimensions of hidden, H, V

PACKED: Shape = ((36,), 24, 333)  # no tile of any backend divides 333
ROWS: Shape = ((4, 9), 24, 333)
EMPTY: Shape = ((0,), 24, 333)
ONE: Shape = ((1,), 1, 2)
SMALL: Shape = ((20,), 40, 150)  # for the interpreter: two or three of its tiles in each dimension
SMALL_ROWS: Shape = ((4, 5), 40, 150)
LONG: Shape = ((7,), 8, 300)  # two vocab chunks of its gradient
TALL: Shape = ((1300,), 40, 3001)  # several token blocks, vocab chunks and threads
TALLER: Shape = ((2600,), 40, 6007)  # more tiles than C++ caches, where torch would take minutes
WIDE: Shape = ((3000,), 2304, 130)  # more hidden states than C++ packs at one time
DTYPES = {
    "fp32": (torch.float32, torch.float32),  # of hidden, of weight
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16 under fp32 weight": (torch.bfloat16, torch.float32),
    "fp64": (torch.float64, torch.float64),
}
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo")
RULES = "sgcd gear rlsd sc_grpo egrsd dgpo turn_level uniform matched_uniform permuted none".split()

HEAD: dict[str, Options] = {
    "plain": {},
    "bias": {"bias": "@bias"},
    "softcap": {"softcap": 5.0},
    "temperature": {"temperature": 0.7},
    "temperature as a tensor": {"temperature": torch.tensor(0.7)},
    "temperature per token": {"temperature": "@temperatures"},
    "all": {"bias": "@bias", "softcap": 5.0, "temperature": "@temperatures"},
    "-inf bias": {"bias": "@forbidding_bias"},
}
OWN_HEAD: Options = {"teacher_hidden": "@wide_hidden", "teacher_weight": "@wide_weight"}
OWN_BIASED: Options = {**OWN_HEAD, "teacher_bias": "@teacher_bias"}
OFF_POLICY: Options = {"old_logp": "@old_logp", "epsilon": 0.1, "epsilon_high": 0.3}
FULL_POLICY: Options = {
    **OFF_POLICY,
    "ref_logp": "@ref_logp",
    "importance_weights": "@importance_weights",
    "beta": 0.05,
    "mask": "@mask",
}
STRIDED: Options = {"hidden": "@strided_hidden", "weight": "@strided_weight", "targets": "@strided_targets"}

LOGPROB: dict[str, Options] = {
    **HEAD,
    "ignore_index": {"ignore_index": 7, "targets": "@targets_with_7"},
    "all ignored": {"targets": "@all_ignored"},
    "nan": {"hidden": "@hidden_with_nan"},
    "strided": STRIDED,
    "columns first": {"hidden": "@hidden_by_column"},
}
DIVERGENCE: dict[str, Options] = {
    **HEAD,
    "same": {"teacher_hidden": "@hidden"},
    "own head": OWN_HEAD,
    "own head, all": {**OWN_BIASED, **HEAD["all"]},
    "own bias": {"bias": "@bias", "teacher_bias": "@teacher_bias"},
    "jsd": {"features": ("jsd",), "beta": 0.3},
    "tv": {"features": ["tv"]},
    "top_k": {"top_k": 5},
    "everything": {"features": ("tv", "jsd"), "top_k": 100, **HEAD["all"]},
    "everything, own head": {"features": ("jsd", "tv"), "beta": 0.9, "top_k": 1, **OWN_BIASED, **HEAD["all"]},
    "everything, -inf bias": {"features": ("jsd", "tv"), "top_k": 3, "bias": "@forbidding_bias"},
    "all ignored": {"targets": "@all_ignored", "features": ("jsd",), "top_k": 2},
    "nan": {"hidden": "@hidden_with_nan", "features": ("jsd", "tv"), "top_k": 4},
    "strided": {**STRIDED, "features": ("jsd", "tv"), "top_k": 4},
}
POLICY: dict[str, Options] = {
    **{f"{loss_type} on policy": {"loss_type": loss_type} for loss_type in LOSS_TYPES},
    **{f"{loss_type} off policy": {"loss_type": loss_type, **OFF_POLICY} for loss_type in LOSS_TYPES},
    **{f"{loss_type} full": {"loss_type": loss_type, **FULL_POLICY, **HEAD["all"]} for loss_type in LOSS_TYPES},
    **HEAD,
    "lse": {"lse": "@lse", **FULL_POLICY},
    "per sequence": {"advantages": "@advantages_per_sequence"},
    "num_items_in_batch": {"num_items_in_batch": 11, **OFF_POLICY},
    "num_items_in_batch as a tensor": {"num_items_in_batch": torch.tensor(11), "loss_type": "dapo", **FULL_POLICY},
    "ignore_index": {"ignore_index": 7, "targets": "@targets_with_7"},
    "all masked": {"mask": "@no_mask", **OFF_POLICY},
    "nan": {"hidden": "@hidden_with_nan"},
    "nan where masked": {"hidden": "@hidden_with_nan", "mask": "@mask_of_nan"},
    "strided": {**STRIDED, **FULL_POLICY},
}
DISTILL: dict[str, Options] = {
    **{f"{kind} {reduction}": {"kind": kind, "reduction": reduction}
       for kind in ("reverse_kl", "forward_kl", "jsd") for reduction in ("none", "mean", "sum")},
    **{f"{kind} own head": {"kind": kind, "beta": 0.2, **OWN_BIASED, **HEAD["all"]}
       for kind in ("reverse_kl", "forward_kl", "jsd")},
    **{f"{kind} -inf bias": {"kind": kind, "bias": "@forbidding_bias", "mask": "@mask"}
       for kind in ("reverse_kl", "forward_kl", "jsd")},
    **{f"jsd {name}": {"kind": "jsd", "beta": 0.7, **options} for name, options in HEAD.items()},
    "masked": {"mask": "@mask"},
    "all masked": {"mask": "@no_mask"},
    "nan where masked": {"hidden": "@hidden_with_nan", "mask": "@mask_of_nan"},
    "strided": {"hidden": "@strided_hidden", "weight": "@strided_weight", "kind": "jsd"},
}  # fmt: skip
FULL_SGCD: Options = {
    **FULL_POLICY,
    **HEAD["all"],
    **OWN_BIASED,
    "credit_mask": "@credit_mask",
    "turn_ids": "@turn_ids",
    "num_items_in_batch": 9.0,
}
SGCD: dict[str, Options] = {
    **{f"{loss_type}": {"loss_type": loss_type} for loss_type in LOSS_TYPES},
    **{f"{loss_type} full": {"loss_type": loss_type, **FULL_SGCD} for loss_type in LOSS_TYPES},
    **{f"{rule}": {"config": CreditConfig(rule=rule, d_floor=0.01), "turn_ids": "@turn_ids"} for rule in RULES},
    "gamma 0": {"config": CreditConfig(gamma=0.0), **OFF_POLICY},
    "same": {"teacher_hidden": "@hidden"},
    "per sequence": {"advantages": "@advantages_per_sequence", "mask": "@mask"},
    "all masked": {"mask": "@no_mask"},
    "no credit": {"credit_mask": "@no_mask"},
    "strided": {**STRIDED, "mask": "@mask"},
    "ignore_index": {"ignore_index": 7, "targets": "@targets_with_7"},
}


@dataclass(frozen=True)
class Batch:
    """The tensors that a call may be given; those derived from them are properties. Per token unless said."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    targets: Tensor
    teacher_hidden: Tensor  # [..., H]
    wide_hidden: Tensor  # [..., H + 8], of a teacher with a head of its own
    wide_weight: Tensor  # [V, H + 8]
    teacher_bias: Tensor  # [V]
    temperatures: Tensor
    advantages: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    importance_weights: Tensor
    mask: Tensor
    credit_mask: Tensor
    turn_ids: Tensor
    probes: Tensor  # [3, ...], what the gradients of per-token results are taken with

    @property
    def leading(self) -> torch.Size:
        return self.targets.shape

    @property
    def cu_seqlens(self) -> Tensor | None:  # [B + 1]; one sequence is empty
        n = self.targets.shape[0]
        bounds = [0, n // 3, n // 3, n - n // 4, n]
        return torch.tensor(bounds, device=self.targets.device) if self.targets.dim() == 1 else None

    @property
    def advantages_per_sequence(self) -> Tensor:
        sequences = 4 if self.targets.dim() == 1 else self.leading[0]
        return torch.linspace(-1, 1.5, sequences, device=self.targets.device)

    @property
    def forbidding_bias(self) -> Tensor:
        forbidden = torch.arange(self.bias.numel(), device=self.bias.device) % 5 == 2
        return self.bias.masked_fill(forbidden, -torch.inf)

    @property
    def targets_with_7(self) -> Tensor:
        known = self.targets.masked_fill(self.targets == -100, 7)
        return known.reshape(-1).index_fill_(0, self._some, 7).reshape(self.leading)

    @property
    def all_ignored(self) -> Tensor:
        return torch.full_like(self.targets, -100)

    @property
    def no_mask(self) -> Tensor:
        return torch.zeros_like(self.mask)

    @property
    def hidden_with_nan(self) -> Tensor:
        flat = self.hidden.reshape(-1, self.hidden.shape[-1]).clone()
        return flat.index_fill_(0, self._some[:1], torch.nan).reshape(self.hidden.shape)

    @property
    def mask_of_nan(self) -> Tensor:
        return ~self.hidden_with_nan.isnan().any(-1)

    @property
    def strided_hidden(self) -> Tensor:
        return torch.nn.functional.pad(self.hidden, (3, 5))[..., 3:-5]

    @property
    def strided_weight(self) -> Tensor:
        return torch.nn.functional.pad(self.weight, (3, 5))[:, 3:-5]

    @property
    def strided_targets(self) -> Tensor:
        return torch.stack([self.targets, self.targets], -1)[..., 0]

    @property
    def hidden_by_column(self) -> Tensor:
        return self.hidden.movedim(-1, 0).contiguous().movedim(0, -1)

    @property
    def lse(self) -> Tensor:
        return linear_logprob(self.hidden, self.weight, self.targets, impl="torch").lse

    @property
    def _some(self) -> Tensor:
        return torch.arange(2, self.targets.numel(), 7, device=self.targets.device)

    def shard(self, ids: slice) -> Batch:
        """The batch of a rank that holds these vocab ids."""
        rows = ("weight", "bias", "wide_weight", "teacher_bias")
        return replace(self, **{name: getattr(self, name)[ids] for name in rows})

    def fill(self, options: Options) -> dict[str, Any]:
        """The options, with the batch's tensors where they are named."""
        named = {k: v for k, v in options.items() if isinstance(v, str) and v.startswith("@")}
        return {**options, **{name: getattr(self, value[1:]) for name, value in named.items()}}


@functools.lru_cache(maxsize=4)
def make_batch(shape: Shape, dtype: str, device: str = "cpu") -> Batch:
    """Seeded by the shape alone."""
    leading, width, vocab = shape
    of_hidden, of_weight = DTYPES[dtype]
    generator = torch.Generator().manual_seed(width * 7 + vocab)
    stats = torch.float64 if dtype == "fp64" else torch.float32

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) * scale

    hidden = normal(*leading, width, scale=2.0)
    targets = torch.randint(vocab, leading, generator=generator)
    targets.reshape(-1)[5::11] = -100
    values: dict[str, Tensor] = {
        "hidden": hidden.to(of_hidden),
        "weight": normal(vocab, width, scale=width**-0.5).to(of_weight),
        "bias": normal(vocab).to(of_weight),
        "targets": targets,
        "teacher_hidden": (hidden + normal(*leading, width, scale=0.6)).to(of_hidden),
        "wide_hidden": normal(*leading, width + 8, scale=2.0).to(of_hidden),
        "wide_weight": normal(vocab, width + 8, scale=width**-0.5).to(of_weight),
        "teacher_bias": normal(vocab).to(of_weight),
        "temperatures": torch.rand(leading, generator=generator).to(stats) + 0.5,
        "advantages": normal(*leading).to(stats),
        "old_logp": normal(*leading, scale=0.5).to(stats) - 5,
        "ref_logp": normal(*leading, scale=0.5).to(stats) - 5,
        "importance_weights": torch.rand(leading, generator=generator).to(stats) * 2,
        "mask": torch.rand(leading, generator=generator) > 0.2,
        "credit_mask": torch.rand(leading, generator=generator) > 0.2,
        "turn_ids": (torch.rand(leading, generator=generator) > 0.8).long().cumsum(-1),
        "probes": normal(3, *leading).to(stats),
    }
    return Batch(**{name: value.to(device) for name, value in values.items()})


class _Leaves(dict[str, Tensor]):
    """Copies of hidden, weight and bias whose gradients are asked for, `needs` of them."""

    @classmethod
    def of(cls, b: Batch, options: dict[str, Any], needs: Iterable[str]) -> _Leaves:
        given = {"hidden": options.pop("hidden", b.hidden), "weight": options.pop("weight", b.weight)}
        if "bias" in options:
            given["bias"] = options.pop("bias")
        leaves = cls()
        for name, value in given.items():
            copy = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
            leaves[name] = copy.copy_(value).requires_grad_(name in needs)
        return leaves

    def gradients(self, loss: Tensor) -> Outputs:
        wanted = {name: x for name, x in self.items() if x.requires_grad}
        if not wanted:
            return {}
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return {f"gradient of {name}": g for name, g in zip(wanted, found) if g is not None}


ALL = ("hidden", "weight", "bias")


def call_logprob(b: Batch, options: Options, needs: Iterable[str] = ALL, fields: int = 3) -> Outputs:
    """With gradients of the first `fields` results."""
    o = b.fill(options)
    leaves = _Leaves.of(b, o, needs)
    stats = linear_logprob(targets=o.pop("targets", b.targets), **leaves, **o)
    loss = torch.stack([(x * probe).sum() for x, probe in zip(stats[:fields], b.probes)]).sum()
    return {**stats._asdict(), **leaves.gradients(loss)}


def call_divergence(b: Batch, options: Options) -> Outputs:
    o = b.fill(options)
    given = {"weight": b.weight, "targets": b.targets, "teacher_hidden": b.teacher_hidden, **o}
    given["student_hidden"] = given.pop("hidden", b.hidden)
    return {name: x for name, x in linear_divergence(**given)._asdict().items() if x is not None}


def call_policy(b: Batch, options: Options, needs: Iterable[str] = ALL, factor: float = 1.0) -> Outputs:
    """With gradients of `factor` times the loss."""
    o = {"targets": b.targets, "advantages": b.advantages, "cu_seqlens": b.cu_seqlens, **b.fill(options)}
    leaves = _Leaves.of(b, o, needs)
    return _loss_metrics_gradients(leaves, *linear_policy_loss(**leaves, **o), factor=factor)


def call_distill(b: Batch, options: Options, needs: Iterable[str] = ALL) -> Outputs:
    o = {"teacher_hidden": b.teacher_hidden, **b.fill(options)}
    leaves = _Leaves.of(b, o, needs)
    hidden = leaves["hidden"]
    rest = {name: x for name, x in leaves.items() if name != "hidden"}
    loss = linear_distill_loss(student_hidden=hidden, **rest, **o)
    return {"loss": loss, **leaves.gradients((loss * b.probes[0]).sum() if loss.dim() else loss)}


def call_sgcd(b: Batch, options: Options, needs: Iterable[str] = ALL) -> Outputs:
    given = {"targets": b.targets, "teacher_hidden": b.teacher_hidden, "advantages": b.advantages}
    o = {**given, "cu_seqlens": b.cu_seqlens, "config": CreditConfig(d_floor=0.01), **b.fill(options)}
    leaves = _Leaves.of(b, o, needs)
    return _loss_metrics_gradients(leaves, *sgcd_loss(**leaves, **o))


def _loss_metrics_gradients(leaves: _Leaves, loss: Tensor, metrics: Outputs, factor: float = 1.0) -> Outputs:
    named = {f"metric {name}": x for name, x in metrics.items()}
    return {"loss": loss, **named, **leaves.gradients(loss * factor)}


OPS: dict[str, tuple[Callable[..., Outputs], dict[str, Options]]] = {
    "linear_logprob": (call_logprob, LOGPROB),
    "linear_divergence": (call_divergence, DIVERGENCE),
    "linear_policy_loss": (call_policy, POLICY),
    "linear_distill_loss": (call_distill, DISTILL),
    "sgcd_loss": (call_sgcd, SGCD),
}
# What is called with every dtype, and at every size: one or two calls for each path through a backend.
FEW = {
    "linear_logprob": ("plain", "all"),
    "linear_divergence": ("plain", "own head, all", "everything", "everything, own head"),
    "linear_policy_loss": ("grpo on policy", "dapo full", "gspo full", "lse"),
    "linear_distill_loss": ("reverse_kl mean", "reverse_kl own head", "forward_kl own head", "jsd own head", "jsd all"),
    "sgcd_loss": ("grpo", "dapo full"),
}
SHORT = {op: tuple(name for name in names if "everything" not in name) for op, names in FEW.items()}  # K fits any V
# In Triton's interpreter a call takes a second.
IN_INTERPRETER: dict[str, tuple[str, ...]] = {
    "linear_logprob": tuple(LOGPROB),
    "linear_divergence": (*FEW["linear_divergence"], "same", "jsd", "tv", "top_k", "everything, -inf bias", "strided"),
    "linear_policy_loss": (*FEW["linear_policy_loss"], "cispo off policy", "nan where masked", "all masked", "strided"),
    "linear_distill_loss": (*FEW["linear_distill_loss"], "masked", "all masked", "jsd -inf bias", "strided"),
    "sgcd_loss": FEW["sgcd_loss"],
}
FEWEST = {
    "linear_logprob": ("all",),
    "linear_divergence": ("everything", "own head, all"),
    "linear_policy_loss": ("dapo full",),
    "linear_distill_loss": ("reverse_kl own head", "jsd all"),
}


def _on_batch(call: Callable[..., Outputs], shape: Shape, dtype: str, device: str, options: Options) -> Outputs:
    return call(make_batch(shape, dtype, device), options)


def _each(impl: str, shape: Shape, dtype: str, device: str, chosen: Mapping[str, Iterable[str]]) -> Iterator[Case]:
    for op, names in chosen.items():
        call, options = OPS[op]
        for name in names:
            for reuse in (False, True) if op == "sgcd_loss" else (None,):
                given = {**options[name], "impl": impl, **({} if reuse is None else {"reuse_lse": reuse})}
                suffix = "" if reuse is None else f", reuse_lse={reuse}"
                yield (
                    f"{op}, {impl}, {dtype}, {shape}, {name}{suffix}",
                    partial(_on_batch, call, shape, dtype, device, given),
                )


def op_cases(impl: str) -> Iterator[Case]:
    """The five ops on one backend."""
    if impl == "triton" and not torch.cuda.is_available():
        yield from _interpreter_cases()
        return
    device = "cuda" if impl == "triton" else "cpu"
    every = {op: tuple(options) for op, (_, options) in OPS.items()}
    for shape in (PACKED, ROWS):
        yield from _each(impl, shape, "fp32", device, every)
    for dtype in ("bf16", "fp16", "bf16 under fp32 weight", *(("fp64",) if impl == "torch" else ())):
        yield from _each(impl, PACKED, dtype, device, every)
    for shape in (EMPTY, ONE):
        yield from _each(impl, shape, "fp32", device, SHORT)
    tall = TALL if impl == "torch" else TALLER
    yield from _each(impl, tall, "fp32", device, FEW)
    for shape, dtype in ((tall, "bf16"), (WIDE, "fp32"), (WIDE, "bf16")):
        yield from _each(impl, shape, dtype, device, FEWEST)
    yield (
        f"linear_divergence, {impl}, long lists",
        partial(_on_batch, call_divergence, tall, "fp32", device, {"top_k": 300, "impl": impl}),
    )
    yield from _gradient_cases(impl, make_batch(PACKED, "fp32", device))


def _interpreter_cases() -> Iterator[Case]:
    yield from _each("triton", SMALL, "fp32", "cpu", IN_INTERPRETER)
    for shape in (EMPTY, ONE):
        yield from _each("triton", shape, "fp32", "cpu", SHORT)
    for shape, dtype in ((SMALL_ROWS, "fp32"), (LONG, "fp32"), (LONG, "fp16"), (SMALL, "bf16"), (SMALL, "fp16"),
                         (SMALL, "bf16 under fp32 weight")):  # fmt: skip
        yield from _each("triton", shape, dtype, "cpu", FEWEST)
    yield from _gradient_cases("triton", make_batch(LONG, "fp32"))


def _gradient_cases(impl: str, b: Batch) -> Iterator[Case]:
    """Gradients of some inputs or results only, of a scaled loss, and under autocast."""
    for needs in ((), ("hidden",), ("weight",), ("bias",)):
        for name, call in (("linear_logprob", call_logprob), ("linear_policy_loss", call_policy),
                           ("linear_distill_loss", call_distill), ("sgcd_loss", call_sgcd)):  # fmt: skip
            given = {"impl": impl, "bias": "@bias", **({"reuse_lse": False} if call is call_sgcd else {})}
            yield f"{name}, {impl}, needs {needs}", partial(call, b, given, needs)
    for fields in (1, 2):
        yield (
            f"linear_logprob, {impl}, of {fields}",
            partial(call_logprob, b, {"impl": impl}, fields=fields),
        )
    for dtype in ("fp32", "fp16"):
        half = make_batch(PACKED, dtype, str(b.hidden.device))
        yield (
            f"linear_policy_loss, {impl}, {dtype}, scaled",
            partial(call_policy, half, {"impl": impl, **OFF_POLICY}, factor=0.37),
        )

    def autocast() -> Outputs:
        with torch.autocast(b.hidden.device.type, torch.bfloat16):
            return call_policy(b, {"impl": impl}) | call_divergence(b, {"impl": impl})

    yield f"autocast, {impl}", autocast


def call_credit(given: dict[str, Any]) -> Outputs:
    return credit_weights(**given)._asdict()


def credit_cases() -> Iterator[Case]:
    """Every rule, with and without what it may be given."""
    for dtype, tokens in (("fp32", 900), ("fp64", 40)):
        b = make_batch(((tokens,), 8, 12), dtype)
        g = torch.Generator().manual_seed(tokens)
        real = b.advantages.dtype
        signals = {
            "divergence": torch.rand(tokens, generator=g, dtype=torch.float64).pow(4).to(real) * 3,
            "teacher_entropy": torch.rand(tokens, generator=g, dtype=torch.float64).to(real),
            "student_entropy": torch.rand(tokens, generator=g, dtype=torch.float64).to(real),
            "log_ratio": b.probes[0],
            "forward_kl": b.probes[1].abs(),
            "bhattacharyya": torch.rand(tokens, generator=g, dtype=torch.float64).to(real),
            "cu_seqlens": b.cu_seqlens,
        }
        optional: dict[str, dict[str, Any]] = {
            "": {"turn_ids": b.turn_ids},
            "mask": {"mask": b.credit_mask, "turn_ids": b.turn_ids},
            "per sequence": {"advantages": b.advantages_per_sequence, "turn_ids": b.turn_ids},
            "turns that return": {"turn_ids": b.turn_ids % 3, "mask": b.credit_mask},
            "no turns": {},
            "nothing eligible": {"mask": b.no_mask, "turn_ids": b.turn_ids},
        }
        configs = {f"{rule}, {value}": CreditConfig(rule=rule, span_value=value)
                   for rule in RULES for value in ("onset", "own")}  # fmt: skip
        configs |= {"sgcd, other": CreditConfig(d_floor=1.0, gamma=0.5, clip=1.3, quantile=0.8, patience=2, start=0.3,
                                                reset=0.3, entropy_ratio=1.0, entropy_margin=0.0),
                    "permuted, seed 5": CreditConfig(rule="permuted", seed=5)}  # fmt: skip
        for (config_name, config), (name, more) in itertools.product(configs.items(), optional.items()):
            if config.rule == "turn_level" and "turn_ids" not in more:
                continue
            given = {"advantages": b.advantages, **signals, **more, "config": config}
            yield (
                f"credit_weights, {dtype}, {config_name}, {name}",
                partial(call_credit, given),
            )


def wrapper_cases() -> Iterator[Case]:
    """The module and the integrations."""
    b, flat = make_batch(ROWS, "fp32"), make_batch(PACKED, "fp32")

    def module() -> Outputs:
        criterion = FusedLinearSGCDLoss(loss_type="dapo", reuse_lse=False, softcap=5.0, epsilon_high=0.3)
        leaves = _Leaves.of(flat, {}, ALL)
        rest = (flat.targets, flat.teacher_hidden, flat.advantages, flat.cu_seqlens, flat.mask)
        loss, metrics = criterion(leaves["hidden"], leaves["weight"], *rest, old_logp=flat.old_logp)
        return _loss_metrics_gradients(leaves, loss, metrics)

    def liger(criterion: torch.nn.Module, **more: Tensor) -> Outputs:
        leaves = _Leaves.of(b, {"bias": b.bias}, ALL)
        known = {"ref_per_token_logps": b.ref_logp, "old_per_token_logps": b.old_logp}
        loss, metrics = criterion(
            leaves["hidden"], leaves["weight"], b.targets.clamp(min=0), b.mask, b.advantages, leaves["bias"],
            **known, vllm_is_ratio=b.importance_weights, **more,
        )  # fmt: skip
        return _loss_metrics_gradients(leaves, loss, {str(at): x for at, x in enumerate(metrics)})

    def cross_entropy(reduction: str, shift: int) -> Outputs:
        leaves = _Leaves.of(b, {"bias": b.bias}, ALL)
        loss = linear_cross_entropy(
            leaves["hidden"], leaves["weight"], b.targets, bias=leaves["bias"], softcap=5.0, reduction=reduction,
            shift=shift,
        )  # fmt: skip
        return {"loss": loss, **leaves.gradients(loss.sum())}

    yield "FusedLinearSGCDLoss", module
    for loss_type in LOSS_TYPES[:-1]:
        made = {"loss_type": loss_type, "max_completion_length": 12, "epsilon_high": 2.0, "temperature": 0.8}
        yield f"liger GRPO, {loss_type}", partial(liger, LigerFusedLinearGRPOLoss(**made))
    yield (
        "liger GRPO, sequence",
        partial(liger, LigerFusedLinearGRPOLoss(loss_type="grpo", importance_sampling_level="sequence")),
    )
    gamma_0 = CreditConfig(gamma=0.0)  # with credit, it follows the default of reuse_lse
    credit = LigerFusedLinearSGCDLoss(config=gamma_0)
    yield "liger SGCD, gamma 0", partial(liger, credit, teacher_input=b.teacher_hidden)
    for reduction, shift in itertools.product(("none", "mean", "sum"), (0, 2)):
        yield f"cut_cross_entropy, {reduction}, shift {shift}", partial(cross_entropy, reduction, shift)


def sharded_cases(rank: int, group: Any) -> Iterator[Case]:
    """A few calls of every op by one of two ranks, which hold very different parts of the vocabulary."""
    shape: Shape = ((12,), 24, 333)
    ids = slice(0, 40) if rank == 0 else slice(40, 333)
    chosen = {
        "linear_logprob": ("plain", "all"),
        "linear_divergence": ("everything", "own head, all"),
        "linear_policy_loss": ("grpo on policy", "dapo full", "lse"),
        "linear_distill_loss": ("reverse_kl own head", "forward_kl mean", "jsd all"),
        "sgcd_loss": ("grpo",),
    }
    impls = ["torch", "auto"] + ["triton"] * backend_status()["triton"].usable
    for impl, dtype, (op, names) in itertools.product(impls, ("fp32", "bf16"), chosen.items()):
        call, options = OPS[op]
        for name in names if impl != "triton" else names[:1]:
            whole = make_batch(shape, dtype, "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu")
            for reuse in (False, True) if op == "sgcd_loss" else (None,):
                given = {**whole.fill({k: v for k, v in options[name].items() if v == "@lse"}), "impl": impl}
                given |= {"group": group, **({} if reuse is None else {"reuse_lse": reuse})}
                given = {**options[name], **given}
                yield (
                    f"rank {rank} of 2, {op}, {impl}, {dtype}, {name}, {reuse}",
                    partial(call, whole.shard(ids), given),
                )


def cases() -> Iterator[Case]:
    """All calls of one process."""
    for impl in ("torch", "cpp", "triton"):
        if backend_status()[impl].usable:
            yield from op_cases(impl)
    yield from credit_cases()
    yield from wrapper_cases()
