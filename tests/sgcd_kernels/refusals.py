"""Wrong calls of every public function, each in one argument or a pair, and the errors that the library raises.

    python -m tests.sgcd_kernels.refusals record   # writes refusals.json again, with the current messages
    python -m tests.sgcd_kernels.refusals list     # prints it, and the calls that are accepted

A call is a public function's name and plain keyword arguments. `refusals.json` holds the type and message of the error
of each call that the library refuses. Where it is PyTorch or Python that stumbles over an argument, the table says no
more than that; calls that are accepted are in no table.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import tests.conftest  # noqa: F401 - chooses Triton's interpreter where there is no GPU
from sgcd_kernels import (
    CreditConfig,
    FusedLinearSGCDLoss,
    backend_status,
    check_model,
    credit_weights,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)
from sgcd_kernels.integrations.cut_cross_entropy import linear_cross_entropy
from sgcd_kernels.integrations.liger import LigerFusedLinearGRPOLoss, LigerFusedLinearSGCDLoss

GOLDEN = Path(__file__).with_name("refusals.json")
Arguments = dict[str, Any]
Calls = dict[str, Callable[[], Any]]


class Sharded(Tensor):
    """Looks like a DTensor to who asks for `placements`."""

    placements = ("Shard(0)",)


class Foreign(Tensor):
    """A subclass that the library does not know."""


# The arguments of a correct call.
N, H, V = 6, 4, 9
_G = torch.Generator().manual_seed(0)
HIDDEN, TEACHER, WEIGHT = (torch.randn(n, H, generator=_G) for n in (N, N, V))
TARGETS, CU = torch.tensor([3, 1, 8, 0, 5, 7]), torch.tensor([0, 2, 6])
SIGNAL = torch.linspace(0.1, 1.0, N)
FLAGS = torch.tensor([True, True, False, True, True, True])
BIAS = torch.linspace(-1, 1, V)
IDS, STATES = TARGETS.view(2, 3), HIDDEN.view(2, 3, H)

LOGPROB = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS}
DIVERGENCE = {"student_hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "teacher_hidden": TEACHER}
POLICY = {**LOGPROB, "advantages": SIGNAL, "cu_seqlens": CU}
DISTILL = {"student_hidden": HIDDEN, "weight": WEIGHT, "teacher_hidden": TEACHER}
SGCD = {**POLICY, "teacher_hidden": TEACHER}
CREDIT = {"divergence": SIGNAL, "teacher_entropy": SIGNAL, "cu_seqlens": CU}
LIGER = {"_input": STATES, "lin_weight": WEIGHT, "selected_token_ids": IDS, "attention_mask": torch.ones(2, 3),
         "advantages": torch.tensor([1.0, -1.0])}  # fmt: skip
CROSS_ENTROPY = {"e": HIDDEN, "c": WEIGHT, "targets": TARGETS}
ROWS = {"hidden": STATES, "targets": IDS, "advantages": SIGNAL.view(2, 3), "cu_seqlens": None}


def wrong_tensors(x: Tensor, *, required: bool) -> Arguments:
    """What no op takes for a tensor, whatever it stands for."""
    out: Arguments = {
        "a list": [1.0, 2.0],
        "a string": "x",
        "a number": 3,
        "on meta": x.to("meta"),
        "a DTensor": x.as_subclass(Sharded),
        "a subclass": x.as_subclass(Foreign),
        "sparse": x.to_sparse(),
        "nested": torch.nested.nested_tensor([x, x], layout=torch.jagged),
        "0-dimensional": x.reshape(-1)[0],
        "one dimension more": x.unsqueeze(0),
        "one short": x[:-1],
        "one column short": x[..., :-1],
        "four-dimensional": x.reshape(1, 1, *x.shape[:1], -1),
        "without rows": x[:0],
    }
    return {**out, "None": None} if required else out


def wrong_floats(x: Tensor) -> Arguments:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that quantised tensors are deprecated
        quantised = torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
    return {
        "int64": x.long(),
        "bool": x > 0,
        "complex": x.to(torch.complex64),
        "float8": x.to(torch.float8_e4m3fn),
        "int8": x.to(torch.int8),
        "quantised": quantised,
    }


def wrong_integers(x: Tensor) -> Arguments:
    return {
        "float32": x.float(),
        "bool": x > 0,
        "complex": x.to(torch.complex64),
        "negative": -x - 1,
        "too large": x + 100,
    }


NUMBERS: Arguments = {
    "negative": -1.0,
    "zero": 0.0,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "a string": "0.2",
    "a bool": True,
    "None": None,
    "a list": [1.0],
    "complex": 1j,
    "above one": 1.5,
    "no float": 10**400,
    "too large": 1e308,
    "subnormal": 5e-324,
    "a decimal": Decimal("0.5"),
}
INTEGERS: Arguments = {
    "a float": 1.0,
    "a string": "1",
    "a bool": True,
    "None": None,
    "nan": math.nan,
    "negative": -1,
    "zero": 0,
    "huge": 10**6,
    "no int64": 10**30,
}
NAMES: Arguments = {"unknown": "torhc", "None": None, "a number": 1, "in capitals": "GRPO"}
GROUPS: Arguments = {"a string": "tp", "a number": 0, "an object": SimpleNamespace(size=2)}
CONFIGS: Arguments = {"None": None, "a dict": {"gamma": 1.0}, "a string": "sgcd", "the class": CreditConfig}
NUMBER_TENSORS: Arguments = {
    "a negative tensor": torch.tensor(-1.0),
    "a zero tensor": torch.tensor(0),
    "a nan tensor": torch.tensor(math.nan),
    "a tensor of one negative": torch.tensor([-2.0]),
    "a tensor of two": torch.tensor([1.0, 2.0]),
    "a DTensor": torch.tensor(1.0).as_subclass(Sharded),
    "a tensor on meta": torch.tensor(1.0, device="meta"),
    "a complex tensor": torch.tensor(1j),
}
TEMPERATURES: Arguments = {
    **NUMBERS,
    **NUMBER_TENSORS,
    "an infinite tensor": torch.tensor(math.inf),
    "per token, one negative": torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, 1.0]),
    "per token, one nan": torch.tensor([1.0, 1.0, math.nan, 1.0, 1.0, 1.0]),
    "per token, one zero": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0]),
    "per token, on meta": torch.ones(N, device="meta"),
    "one short": torch.ones(N - 1),
    "a column": torch.ones(N, 1),
}
FEATURES: Arguments = {
    "a string": "jsd",
    "unknown": ("jds",),
    "one of two unknown": ("jsd", "tvd"),
    "None": None,
    "a number": 3,
    "numbers": (1,),
}

BRIEF = (
    "a list",
    "on meta",
    "a DTensor",
    "a subclass",
    "sparse",
    "one short",
    "int64",
    "float32",
    "not to N",
    "None",
    "unknown",
    "negative",
    "nan",
)
UNCLEAR = "an error of PyTorch or Python"
# Argument -> its wrong values, wherever a function has an argument of that name.
TENSORS = {
    "hidden": HIDDEN, "student_hidden": HIDDEN, "teacher_hidden": TEACHER, "weight": WEIGHT, "teacher_weight": WEIGHT,
    "bias": BIAS, "teacher_bias": BIAS, "e": HIDDEN, "c": WEIGHT, "lm_weight": WEIGHT, "lin_weight": WEIGHT,
    "_input": STATES, "teacher_input": STATES, "ref_input": STATES, "ref_weight": WEIGHT, "ref_bias": BIAS,
}  # fmt: skip
PER_TOKEN = (
    "advantages old_logp ref_logp importance_weights mask credit_mask turn_ids lse divergence teacher_entropy "
    "student_entropy log_ratio forward_kl bhattacharyya"
).split()
LIGER_PER_TOKEN = "attention_mask ref_per_token_logps old_per_token_logps vllm_is_ratio".split()
OTHERS = {
    "temperature": TEMPERATURES,
    "softcap": {name: value for name, value in NUMBERS.items() if name != "None"},
    "epsilon": NUMBERS, "epsilon_high": NUMBERS, "epsilon_low": NUMBERS, "beta": NUMBERS,
    "num_items_in_batch": {**NUMBERS, **NUMBER_TENSORS},
    "ignore_index": INTEGERS, "top_k": INTEGERS, "features": FEATURES,
    "impl": NAMES, "loss_type": NAMES, "kind": NAMES, "reduction": NAMES, "importance_sampling_level": NAMES,
    "group": GROUPS, "config": CONFIGS,
}  # fmt: skip
# Function -> (it, a correct call of it, its optional arguments).
HEAD = "bias temperature softcap impl".split()
LOSS = "old_logp ref_logp importance_weights loss_type epsilon epsilon_high beta num_items_in_batch".split()
PAIR = "teacher_weight teacher_bias".split()
FUNCTIONS: dict[str, tuple[Callable[..., Any], Arguments, list[str]]] = {
    "linear_logprob": (linear_logprob, LOGPROB, [*HEAD, "ignore_index", "group"]),
    "linear_divergence": (
        linear_divergence, DIVERGENCE, [*HEAD, *PAIR, "ignore_index", "features", "beta", "top_k", "group"]
    ),
    "linear_policy_loss": (linear_policy_loss, POLICY, [*HEAD, *LOSS, "mask", "ignore_index", "lse", "group"]),
    "linear_distill_loss": (
        linear_distill_loss, DISTILL, [*HEAD, *PAIR, "mask", "kind", "beta", "reduction", "group"]
    ),
    "sgcd_loss": (
        sgcd_loss, SGCD, [*HEAD, *LOSS, *PAIR, "mask", "credit_mask", "turn_ids", "config", "ignore_index", "group"]
    ),
    "credit_weights": (
        credit_weights, CREDIT,
        "mask turn_ids advantages log_ratio forward_kl bhattacharyya student_entropy config".split(),
    ),
    "linear_cross_entropy": (linear_cross_entropy, CROSS_ENTROPY, "bias ignore_index softcap reduction impl".split()),
}  # fmt: skip


def wrong_values(name: str, *, required: bool, brief: bool = False) -> Arguments:
    """Of the argument of that name; `brief` for functions that pass it on to another."""
    values = _wrong_values(name, required)
    return {what: value for what, value in values.items() if not brief or what in BRIEF}


def _wrong_values(name: str, required: bool) -> Arguments:
    if name in TENSORS:
        return wrong_tensors(TENSORS[name], required=required) | wrong_floats(TENSORS[name])
    if name in ("targets", "selected_token_ids"):
        x = TARGETS if name == "targets" else IDS
        return wrong_tensors(x, required=required) | wrong_integers(x)
    if name == "cu_seqlens":
        return wrong_tensors(CU, required=required) | {
            "float32": CU.float(),
            "bool": CU > 0,
            "not from 0": torch.tensor([1, 2, 6]),
            "not to N": torch.tensor([0, 2, 5]),
            "beyond N": torch.tensor([0, 2, 7]),
            "falling": torch.tensor([0, 4, 2, 6]),
            "negative": torch.tensor([0, -2, 6]),
        }
    if name in PER_TOKEN:
        found = wrong_tensors(SIGNAL, required=required) | {"3 values": torch.ones(3), "a column": torch.ones(N, 1)}
        less = ("a number", "0-dimensional", "one column short", "four-dimensional")
        return {what: value for what, value in found.items() if what not in less}
    if name in LIGER_PER_TOKEN:
        return wrong_tensors(SIGNAL.view(2, 3), required=required)
    return OTHERS[name]


def one_wrong_argument() -> Iterator[tuple[str, Callable[[], Any]]]:
    for function, (call, correct, optional) in FUNCTIONS.items():
        for name in [*correct, *optional]:
            brief = function == "linear_cross_entropy"
            for what, value in wrong_values(name, required=name in correct, brief=brief).items():
                yield f"{function}: {name} is {what}", functools.partial(call, **{**correct, name: value})
        for name in correct:
            rest = {key: value for key, value in correct.items() if key != name}
            yield f"{function}: without {name}", functools.partial(call, **rest)
        yield f"{function}: an unknown argument", functools.partial(call, **correct, losstype="grpo")


def combinations() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Arguments that do not fit together, or lack a companion."""
    wide = torch.randn(N, 3)
    f64 = {"hidden": HIDDEN.double(), "weight": WEIGHT.double()}
    pairs: dict[str, dict[str, Arguments]] = {
        "linear_logprob": {
            "rows of hidden, packed targets": {"hidden": STATES},
            "packed hidden, rows of targets": {"targets": IDS},
            "H differs": {"hidden": wide},
            "a negative target": {"targets": torch.tensor([3, -1, 8, 0, 5, 7])},
            "-100 is not the ignore_index": {"targets": torch.tensor([3, -100, 8, 0, 5, 7]), "ignore_index": -1},
            "fp64 on cpp": {**f64, "impl": "cpp"},
            "fp64 on triton": {**f64, "impl": "triton"},
            "columns of weight on cpp": {"weight": WEIGHT.t().contiguous().t(), "impl": "cpp"},
            "columns of weight on triton": {"weight": WEIGHT.t().contiguous().t(), "impl": "triton"},
            "no columns on cpp": {"hidden": HIDDEN[:, :0], "weight": WEIGHT[:, :0], "impl": "cpp"},
            "no columns on triton": {"hidden": HIDDEN[:, :0], "weight": WEIGHT[:, :0], "impl": "triton"},
            "bias and weight on meta": {"weight": WEIGHT.to("meta"), "bias": BIAS.to("meta")},
            "temperature per token of rows": {"hidden": STATES, "targets": IDS, "temperature": torch.ones(N)},
        },
        "linear_divergence": {
            "H' without a weight": {"teacher_hidden": wide},
            "H' does not fit": {"teacher_hidden": wide, "teacher_weight": WEIGHT},
            "V differs": {"teacher_weight": WEIGHT[:8]},
            "rows of the teacher": {"teacher_hidden": TEACHER.view(2, 3, H)},
            "teacher_bias of another V": {"teacher_weight": WEIGHT, "teacher_bias": torch.zeros(8)},
            "jsd with beta 0": {"features": ("jsd",), "beta": 0.0},
            "jsd with beta 1": {"features": ("jsd", "tv"), "beta": 1.0},
            "jsd with beta near 1": {"features": ["jsd"], "beta": 1 - 1e-9},
            "top_k above V": {"top_k": V + 1},
            "fp64 teacher on cpp": {
                "teacher_hidden": TEACHER.double(), "teacher_weight": WEIGHT.double(), "impl": "cpp"
            },
            "fp64 teacher on triton": {
                "teacher_hidden": TEACHER.double(), "teacher_weight": WEIGHT.double(), "impl": "triton"
            },
        },
        "linear_policy_loss": {
            **{f"{loss} without cu_seqlens": {"cu_seqlens": None, "loss_type": loss}
               for loss in ("grpo", "gspo", "dr_grpo")},
            "cu_seqlens beside rows": {**ROWS, "cu_seqlens": CU},
            "rows and 3 advantages": {**ROWS, "advantages": torch.ones(3)},
            "rows and packed advantages": {**ROWS, "advantages": SIGNAL},
            "rows and packed mask": {**ROWS, "mask": FLAGS},
            "beta without ref_logp": {"beta": 0.1},
            "per sequence without cu_seqlens": {
                "cu_seqlens": None, "loss_type": "dapo", "advantages": torch.tensor([1.0, -1.0])
            },
            "a wrong target beside the mask": {"targets": torch.tensor([3, 99, 8, 0, 5, 7]), "mask": FLAGS},
            "fp64 with lse on cpp": {**f64, "lse": SIGNAL, "impl": "cpp"},
        },
        "linear_distill_loss": {
            **{f"jsd with beta {beta}": {"kind": "jsd", "beta": beta} for beta in (0, 1, 1e-7, -0.5, 2.0)},
            "another kind with beta 2": {"kind": "forward_kl", "beta": 2.0},
            "H' without a weight": {"teacher_hidden": wide},
            "V differs": {"teacher_weight": WEIGHT[:8]},
            "fp64 on cpp": {"student_hidden": HIDDEN.double(), "weight": WEIGHT.double(), "impl": "cpp"},
            "mask of rows": {"mask": FLAGS.view(2, 3)},
        },
        "sgcd_loss": {
            "dapo without cu_seqlens": {"cu_seqlens": None, "loss_type": "dapo"},
            "cu_seqlens beside rows": {**ROWS, "teacher_hidden": TEACHER.view(2, 3, H), "cu_seqlens": CU},
            "packed turn_ids beside rows": {**ROWS, "teacher_hidden": TEACHER.view(2, 3, H), "turn_ids": TARGETS},
            "packed teacher beside rows": ROWS,
            "beta without ref_logp": {"beta": 0.1},
            "H' without a weight": {"teacher_hidden": wide},
            "cu_seqlens does not end at N": {"cu_seqlens": torch.tensor([0, 5]), "loss_type": "dapo"},
            "nan hidden": {"hidden": HIDDEN * math.nan},
            "lse": {"lse": SIGNAL},
        },
        "credit_weights": {
            **{f"{rule} without its inputs": {"config": CreditConfig(rule=rule)}  # type: ignore[arg-type]
               for rule in "gear rlsd sc_grpo egrsd dgpo turn_level".split()},
            "turn_level without turn_ids": {"config": CreditConfig(rule="turn_level"), "log_ratio": SIGNAL,
                                            "advantages": SIGNAL},
            "rlsd without log_ratio": {"config": CreditConfig(rule="rlsd"), "advantages": SIGNAL},
            "dgpo with a nan": {"config": CreditConfig(rule="dgpo"), "student_entropy": SIGNAL * math.nan,
                                "bhattacharyya": SIGNAL},
            "one nan": {"divergence": torch.tensor([1.0, 2, math.nan, 3, 4, 5])},
            "two infinite": {"teacher_entropy": torch.tensor([1.0, math.inf, -math.inf, 3, 4, 5])},
            "a nan that counts": {"divergence": torch.tensor([math.nan, 2, math.nan, 3, 4, 5]), "mask": FLAGS},
            "rows": {"divergence": SIGNAL.view(2, 3), "teacher_entropy": SIGNAL.view(2, 3)},
        },
        "linear_cross_entropy": {
            "shift of packed": {"shift": 1},
            "shift True of packed": {"shift": True},
            "shift beyond the sequence": {"e": STATES, "targets": IDS, "shift": 3},
            "a negative shift": {"e": STATES, "targets": IDS, "shift": -1},
            "a shift of a string": {"e": STATES, "targets": IDS, "shift": "a"},
        },
    }  # fmt: skip
    for function, cases in pairs.items():
        call, correct, _ = FUNCTIONS[function]
        for what, changes in cases.items():
            yield f"{function}: {what}", functools.partial(call, **{**correct, **changes})


def settings() -> Iterator[tuple[str, Callable[[], Any]]]:
    """`CreditConfig`, field by field, and the module when it is made."""
    numbers = {what: NUMBERS[what] for what in ("negative", "zero", "nan", "inf", "a string", "a bool", "above one")}
    for field in (field.name for field in dataclasses.fields(CreditConfig)):
        integer, name = field in ("patience", "seed"), field in ("rule", "span_value")
        for what, value in (NAMES if name else INTEGERS if integer else numbers).items():
            yield f"CreditConfig: {field} is {what}", functools.partial(CreditConfig, **{field: value})
    yield "CreditConfig: reset above start", functools.partial(CreditConfig, start=0.1, reset=0.2)
    yield "CreditConfig: clip below one", functools.partial(CreditConfig, clip=0.5)
    yield "CreditConfig: an unknown field", functools.partial(CreditConfig, gama=0.5)  # type: ignore[call-arg]
    for name in "config loss_type epsilon epsilon_high beta temperature softcap ignore_index impl group".split():
        for what, value in wrong_values(name, required=False).items():
            yield f"FusedLinearSGCDLoss: {name} is {what}", functools.partial(FusedLinearSGCDLoss, **{name: value})
    for what, value in {"a number": 1, "a string": "yes", "None": None}.items():
        yield f"FusedLinearSGCDLoss: reuse_lse is {what}", functools.partial(FusedLinearSGCDLoss, reuse_lse=value)
    for name in ("losstype", "gamma", "mask"):
        yield f"FusedLinearSGCDLoss: unknown {name}", functools.partial(FusedLinearSGCDLoss, **{name: "grpo"})
    given = {("lm_weight" if name == "weight" else name): value for name, value in SGCD.items()}
    module = FusedLinearSGCDLoss()
    for name in ("hidden", "lm_weight", "targets", "teacher_hidden", "advantages", "cu_seqlens", "mask", "turn_ids"):
        for what, value in wrong_values(name, required=name in given, brief=True).items():
            yield f"FusedLinearSGCDLoss(): {name} is {what}", functools.partial(module, **{**given, name: value})
    yield "FusedLinearSGCDLoss(): an unknown argument", functools.partial(module, **given, weights=SIGNAL)
    yield "FusedLinearSGCDLoss(): a bound argument", functools.partial(module, **given, loss_type="dapo")


def liger_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    made: dict[str, Arguments] = {
        **{f"loss_type {name}": {"loss_type": name} for name in ("sapo", "vespo", "luspo", "gspo", "GRPO")},
        "level turn": {"importance_sampling_level": "turn"},
        "level sequence with dapo": {"importance_sampling_level": "sequence"},
        "level sequence with cispo": {"importance_sampling_level": "sequence", "loss_type": "cispo"},
        "dr_grpo without a length": {"loss_type": "dr_grpo"},
        "cispo with a clip": {"loss_type": "cispo", "epsilon_high": 0.2},
        "delta": {"delta": 1.5},
        "use_bias_correction_kl": {"use_bias_correction_kl": True},
        "an unknown argument": {"gamma": 1.0},
    }
    for what, options in made.items():
        for kind in (LigerFusedLinearGRPOLoss, LigerFusedLinearSGCDLoss):
            yield f"{kind.__name__}: {what}", functools.partial(kind, **options)
    for what, value in CONFIGS.items():
        yield f"LigerFusedLinearSGCDLoss: config is {what}", functools.partial(LigerFusedLinearSGCDLoss, config=value)
    plain = LigerFusedLinearGRPOLoss(beta=0.0)
    for name in [*LIGER, "bias", "old_per_token_logps", "vllm_is_ratio", "num_items_in_batch"]:
        for what, value in wrong_values(name, required=name in LIGER, brief=True).items():
            yield f"liger GRPO(): {name} is {what}", functools.partial(plain, **{**LIGER, name: value})
    for what, ratio in {
        "3 values": torch.ones(3),
        "[1, 2]": torch.ones(1, 2),
        "[2, 3, 1]": torch.ones(2, 3, 1),
    }.items():
        yield f"liger GRPO(): vllm_is_ratio is {what}", functools.partial(plain, **LIGER, vllm_is_ratio=ratio)
    with_beta = LigerFusedLinearGRPOLoss()
    yield "liger GRPO(): beta without a reference", functools.partial(with_beta, **LIGER)
    yield "liger GRPO(): beta without ref_weight", functools.partial(with_beta, **LIGER, ref_input=STATES)
    reference = {"ref_input": STATES, "ref_weight": WEIGHT}
    for name in [*reference, "ref_bias", "ref_per_token_logps"]:
        for what, value in wrong_values(name, required=False, brief=True).items():
            given = {**LIGER, **reference, name: value}
            yield f"liger GRPO(): {name} is {what}", functools.partial(with_beta, **given)
    options: dict[str, Arguments] = {
        "epsilon_low": {"epsilon_low": "0.2"},
        "temperature": {"temperature": 0.0},
        "beta": {"beta": -0.1},
        "impl": {"impl": "torhc"},
    }
    for what, option in options.items():
        call = functools.partial(LigerFusedLinearGRPOLoss(**option), **LIGER, ref_per_token_logps=SIGNAL.view(2, 3))
        yield f"liger GRPO(): made with a wrong {what}", call
    credit = LigerFusedLinearSGCDLoss(beta=0.0)
    yield "liger SGCD(): without a teacher", functools.partial(credit, **LIGER)
    taught = {**LIGER, "teacher_input": STATES}
    for name in ["teacher_input", "teacher_weight", "teacher_bias", "turn_ids", "credit_mask", "lin_weight"]:
        for what, value in wrong_values(name, required=name in taught, brief=True).items():
            yield f"liger SGCD(): {name} is {what}", functools.partial(credit, **{**taught, name: value})


class Model(nn.Module):
    """As little of a Hugging Face causal LM as `check_model` asks."""

    def __init__(self, head: object, *, tied: bool = False, **config: Any) -> None:
        super().__init__()
        self.head, self.tied, self.config = head, tied, SimpleNamespace(**config)

    def get_output_embeddings(self) -> object:
        return self.head

    def get_input_embeddings(self) -> object:
        return self.head if self.tied else nn.Embedding(V, H)


def model_checks() -> Iterator[tuple[str, Callable[[], Any]]]:
    head = nn.Linear(H, V, bias=False)
    adapted = nn.Linear(H, V)
    adapted.base_layer = head
    models: dict[str, tuple[object, Arguments]] = {
        "no head": (nn.Linear(H, V), {}),
        "None": (None, {}),
        "a head that is None": (Model(None), {}),
        "an adapter": (Model(adapted), {}),
        "weight is a method": (Model(SimpleNamespace(weight=lambda: head.weight)), {}),
        "int8 weight": (Model(SimpleNamespace(weight=head.weight.detach().to(torch.int8))), {}),
        "fp8 weight": (Model(SimpleNamespace(weight=head.weight.detach().to(torch.float8_e4m3fn))), {}),
        "no decoder": (Model(head), {}),
        "packed and recurrent": (Model(head, layer_types=["linear_attention", "mamba"]), {"packed": True}),
        "tied and sharded": (Model(head, tied=True), {"group": object()}),
    }
    for what, (model, options) in models.items():
        yield f"check_model: {what}", functools.partial(check_model, model=model, **options)


def all_calls() -> Calls:
    found = [*one_wrong_argument(), *combinations(), *settings(), *liger_calls(), *model_checks()]
    calls = dict(found)
    assert len(calls) == len(found), "two calls have one name"
    return calls


def refusal(call: Callable[[], Any]) -> str | None:
    """The type and message of the error that a call raises, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except (ValueError, TypeError) as error:
        # Addresses vary, and the name of the private function that misses an argument does not matter.
        message = re.sub(r"^[\w.]+\(\) ", "", re.sub(r"\b0x[0-9a-f]+", "0x...", str(error)))
        clear = "needs" in message or "argument" in message
        return f"{type(error).__name__}: {message}" if clear else UNCLEAR
    except Exception:
        return UNCLEAR
    return None


def cannot_run_here(name: str) -> str | None:
    """Why the message of a call differs on this machine: a backend is missing, or Triton is not interpreted."""
    for backend in ("cpp", "triton"):
        if name.endswith(f"on {backend}"):
            if not (status := backend_status()[backend]).usable:
                return status.reason
            if backend == "triton" and torch.cuda.is_available():
                return "the table was recorded in Triton's interpreter"
    return None


def main(arguments: list[str]) -> int:
    if arguments not in (["record"], ["list"]):
        print(__doc__, file=sys.stderr)
        return 2
    said = {name: refusal(call) for name, call in all_calls().items()}
    if arguments == ["record"]:
        refused = {name: error for name, error in said.items() if error is not None}
        GOLDEN.write_text(json.dumps(refused, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{len(refused)} of {len(said)} calls are refused")
        return 0
    for name, error in said.items():
        print(f"{name}\n    {error or 'accepted'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
