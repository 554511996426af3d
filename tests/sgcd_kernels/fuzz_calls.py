"""Random calls of the library, right ones and wrong ones: each raises a ValueError or agrees with `reference.py`.

    python -m tests.sgcd_kernels.fuzz_calls --calls 20000 [--seed 0]

A call starts from correct arguments of random sizes, dtypes and options; up to three are then replaced by something
odd. What the library accepts is given to the reference too, in fp64.
"""

from __future__ import annotations

import argparse
import decimal
import fractions
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import tests.conftest  # noqa: F401 - chooses Triton's interpreter where there is no GPU
from sgcd_kernels import (
    CreditConfig,
    FusedLinearSGCDLoss,
    backend_status,
    credit_weights,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    reference,
    sgcd_loss,
)
from sgcd_kernels.core.surrogate import LOSS_TYPES
from sgcd_kernels.credit.rules import RULES

Arguments = dict[str, Any]
IGNORED = -100
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
IMPLS = ("auto", "torch", "cpp") if backend_status()["cpp"].usable else ("auto", "torch")


class Subclass(Tensor):
    """A stranger's tensor."""


class Sharded(Tensor):
    """Looks like a DTensor to who asks for `placements`."""

    placements = ("Shard(0)",)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


ODD_NUMBERS: tuple[Any, ...] = (
    10**400, -(10**400), 10**5000, 1e308, -1e308, 5e-324, 1e-21, 1e21, 1e-20, 1e20, 0, 0.0, -0.0, -1, 1, 2, 0.5, 1.0,
    True, False, "1", "", None, math.nan, math.inf, -math.inf, 1j, [1.0], (), {}, object, Unprintable(),
    fractions.Fraction(1, 2), decimal.Decimal("0.5"), np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(2),
    np.bool_(True), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(2), torch.tensor([0.5, 0.5]),
    torch.tensor(math.nan), torch.tensor(-1.0), torch.tensor(0.0), torch.tensor(True), torch.tensor(1j),
    torch.tensor(0.5, device="meta"), torch.tensor(0.5).as_subclass(Subclass), torch.tensor(0.5, requires_grad=True),
    torch.tensor(0.5).as_subclass(Sharded), torch.tensor([]), torch.tensor(0.5).to_sparse(),
)  # fmt: skip
ODD_INTEGERS: tuple[Any, ...] = (
    10**30, -(10**30), 10**5000, 2**63, 2**63 - 1, -(2**63), 0, 1, 2, -1, 1.0, True, "1", None, math.nan, [1], 1j,
    np.int64(1), np.int8(2), np.float32(1), fractions.Fraction(2, 1), torch.tensor(1), object(), Unprintable(),
)  # fmt: skip
ODD_NAMES: tuple[Any, ...] = (
    "", "torhc", "GRPO", None, 0, 1.5, [], ["grpo"], {}, b"grpo", torch.tensor(1), np.array(["grpo", "dapo"]),
    np.str_("torch"), object(), Unprintable(), "x" * 10_000,
)  # fmt: skip
ODD_FEATURES: tuple[Any, ...] = (
    0, 1.5, None, "jsd", "", ("jds",), ("jsd", "jsd"), ["tv", "jsd"], {"tv"}, {"jsd": 1}, (1,), ([],), (None,), b"jsd",
    iter(("jsd",)), np.array(["jsd"]), torch.tensor([1]), object(), (torch.tensor([1, 2]),),
)  # fmt: skip
ODD_OBJECTS: tuple[Any, ...] = (None, 0, "tp", {}, {"gamma": 1.0}, CreditConfig, object(), Unprintable())


def odd_tensor(x: Any, r: random.Random) -> Any:
    """Something else in the place of a tensor, or the same values otherwise laid out."""
    if not isinstance(x, Tensor):
        x = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised, CSR and nested tensors warn that they may change
        made: list[Callable[[], Any]] = [
            lambda: x.to("meta"), lambda: x.to_sparse(), lambda: x.to_sparse_csr(), lambda: x.to(torch.complex64),
            lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), lambda: x > 0, lambda: x.long(),
            lambda: x.to(torch.int8), lambda: x.to(torch.uint16), lambda: x.to(torch.float8_e4m3fn), lambda: x.float(),
            lambda: x.double(), lambda: x.half(), lambda: torch.nested.nested_tensor([x, x]), lambda: -x, lambda: x * 0,
            lambda: torch.nested.nested_tensor([x, x], layout=torch.jagged), lambda: x.as_subclass(Subclass),
            lambda: x.as_subclass(Sharded), lambda: torch.nn.Parameter(x), lambda: x.reshape(-1)[:1].reshape(()),
            lambda: x[:-1], lambda: x[:0], lambda: x[..., :-1], lambda: x[..., :0], lambda: x.unsqueeze(0),
            lambda: x.unsqueeze(-1), lambda: torch.cat([x, x]), lambda: x.t(), lambda: x.flip(0), lambda: x + 100,
            lambda: x.tolist(), lambda: x.numpy(), lambda: None, lambda: 3, lambda: "x", lambda: 0.5, lambda: [x],
            lambda: x.t().contiguous().t(), lambda: torch.stack([x, x], -1)[..., 0], lambda: x[:1].expand(x.shape),
            lambda: torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape), lambda: x.to_mkldnn(),
            lambda: torch._neg_view(x * 1.0), lambda: x.clone().requires_grad_(), object, Unprintable,
        ]  # fmt: skip
        for _ in range(20):
            try:
                return r.choice(made)()
            except Exception:  # not every tensor has every form
                continue
    return x


class Case(NamedTuple):
    """A correct call."""

    function: str
    arguments: Arguments


def chance(r: random.Random, probability: float, value: Callable[[], Any]) -> Any:
    return value() if r.random() < probability else None


def a_case(r: random.Random) -> Case:
    g = torch.Generator().manual_seed(r.getrandbits(32))
    n, h, v, dtype = r.choice((0, 1, 3, 6, 8)), r.choice((0, 1, 2, 5, 8)), r.choice((1, 2, 9, 17)), r.choice(DTYPES)
    by_rows = n in (6, 8) and r.random() < 0.3

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def per_token(x: Tensor) -> Tensor:
        return x.reshape(2, n // 2, *x.shape[1:]) if by_rows else x

    def flags() -> Tensor:
        return per_token(torch.rand(n, generator=g) < 0.7)

    cuts = sorted(r.randint(0, n) for _ in range(r.randint(0, 2)))
    cu = torch.tensor([0, *cuts, n])
    sequences = 2 if by_rows else len(cu) - 1
    targets = torch.randint(v, (n,), generator=g).masked_fill(torch.rand(n, generator=g) < 0.2, IGNORED)
    hidden, teacher = (per_token(rand(n, h).to(dtype)) for _ in range(2))
    weight = rand(v, h).to(r.choice((dtype, dtype, torch.float32)))
    head: Arguments = {
        "bias": chance(r, 0.3, lambda: rand(v)),
        "temperature": r.choice((1.0, 0.7, 2, torch.tensor(0.9), per_token(rand(n).abs() + 0.5))),
        "softcap": chance(r, 0.3, lambda: r.choice((3.0, 30))),
        "impl": r.choice(IMPLS),
    }
    pair: Arguments = {"teacher_hidden": teacher}
    if r.random() < 0.3:
        pair |= {"teacher_weight": rand(v, h).to(dtype), "teacher_bias": chance(r, 0.5, lambda: rand(v))}
    signal = [rand(n).abs().to(r.choice(DTYPES)) for _ in range(7)]
    advantages = r.choice((per_token(rand(n)), rand(sequences)))
    loss: Arguments = {
        "advantages": advantages,
        "cu_seqlens": None if by_rows else cu,
        "mask": chance(r, 0.5, flags),
        "old_logp": chance(r, 0.5, lambda: per_token(rand(n) - 2)),
        "importance_weights": chance(r, 0.3, lambda: per_token(rand(n).abs())),
        "loss_type": r.choice(LOSS_TYPES),
        "epsilon": r.choice((0.2, 0.1, 0)),
        "epsilon_high": r.choice((None, 0.28)),
        "num_items_in_batch": r.choice((None, None, 7, 3.5, torch.tensor(5))),
    }
    if r.random() < 0.3:
        loss |= {"beta": r.choice((0.1, torch.tensor(0.2))), "ref_logp": per_token(rand(n) - 2)}
    config = CreditConfig(
        rule=r.choice(list(RULES)),  # type: ignore[arg-type]
        gamma=r.choice((1.0, 0.5, 0)), d_floor=r.choice((0.1, 1e-3)), span_value=r.choice(("onset", "own")),
        seed=r.choice((0, -3, 10**30)),
    )  # fmt: skip
    turns = per_token(torch.arange(n) // 3)
    names = "divergence teacher_entropy log_ratio forward_kl student_entropy".split()
    student = {"student_hidden": hidden, "weight": weight}
    calls: dict[str, Arguments] = {
        "linear_logprob": {"hidden": hidden, "weight": weight, "targets": per_token(targets), **head},
        "linear_divergence": {
            **student, "targets": per_token(targets), **head, **pair,
            "features": r.choice(((), ("jsd",), ["tv", "jsd"])), "beta": r.choice((0.5, 0.2)),
            "top_k": chance(r, 0.3, lambda: r.randint(1, v)),
        },
        "linear_distill_loss": {
            **student, **head, **pair, "mask": chance(r, 0.5, flags), "beta": r.choice((0.5, 0.2)),
            "kind": r.choice(("reverse_kl", "forward_kl", "jsd")), "reduction": r.choice(("none", "sum", "mean")),
        },
        "linear_policy_loss": {"hidden": hidden, "weight": weight, "targets": per_token(targets), **head, **loss},
        "sgcd_loss": {
            "hidden": hidden, "weight": weight, "targets": per_token(targets), **head, **pair, **loss, "config": config,
            "has_teacher": chance(r, 0.3, flags), "credit_mask": chance(r, 0.3, flags),
            "turn_ids": turns if config.rule == "turn_level" else chance(r, 0.3, lambda: turns),
        },
        "credit_weights": {
            **dict(zip(names, signal)), "bhattacharyya": signal[5].clamp(max=1), "cu_seqlens": cu, "config": config,
            "turn_ids": turns.reshape(-1), "advantages": r.choice((rand(n), rand(len(cu) - 1))),
            "mask": chance(r, 0.5, lambda: flags().reshape(-1)),
        },
        "CreditConfig": {name: getattr(config, name) for name in r.sample(list(vars(config)), 4)},
        "FusedLinearSGCDLoss": {"config": config, "temperature": 0.7, "softcap": None, "ignore_index": IGNORED,
                                "impl": "auto", "loss_type": "dapo", "epsilon": 0.2, "beta": 0.0, "group": None,
                                "reuse_lse": True, "epsilon_high": None},
    }  # fmt: skip
    function = r.choice([*calls] + [name for name in calls if name[0].islower()] * 3)
    return Case(function, calls[function])


NUMBERS = "temperature softcap epsilon epsilon_high beta num_items_in_batch".split()
CONFIG_NUMBERS = [name for name, value in vars(CreditConfig()).items() if isinstance(value, float)]


def spoil(case: Case, r: random.Random) -> Case:
    """Replace up to three arguments."""
    arguments = dict(case.arguments)
    optional = {"linear_logprob": ["ignore_index", "group"], "linear_divergence": ["ignore_index", "group"]}
    names = [*arguments, *optional.get(case.function, [])]
    for name in r.sample(names, min(len(names), r.randint(1, 3))):
        value = arguments.get(name)
        if name in NUMBERS or name in CONFIG_NUMBERS:
            arguments[name] = r.choice(ODD_NUMBERS)
        elif name in ("ignore_index", "top_k", "patience", "seed"):
            arguments[name] = r.choice(ODD_INTEGERS)
        elif name in ("impl", "loss_type", "kind", "reduction", "rule", "span_value"):
            arguments[name] = r.choice(ODD_NAMES)
        elif name == "features":
            arguments[name] = r.choice(ODD_FEATURES)
        elif name in ("group", "config", "reuse_lse"):
            arguments[name] = r.choice(ODD_OBJECTS)
        elif name == "cu_seqlens" and r.random() < 0.5:
            arguments[name] = torch.tensor(
                r.choice(([0], [0, 5], [0, 4, 2, 6], [1, 6], [0, 0, 6], [0, 6, 6], [6], [-1, 6], [0, 2**40]))
            )
        else:
            arguments[name] = odd_tensor(value, r)
    return Case(case.function, arguments)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (linear_logprob, linear_divergence, linear_distill_loss, linear_policy_loss, sgcd_loss, credit_weights,
              CreditConfig, FusedLinearSGCDLoss)
}  # fmt: skip


def exact(x: Any) -> Any:
    """What the reference takes: fp64 tensors, plain numbers."""
    if isinstance(x, Tensor):
        x = x.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        return x.double() if x.is_floating_point() else x
    return float(x) if isinstance(x, (float, np.floating, fractions.Fraction)) else x


def number(x: Any) -> Any:
    return None if x is None else float(x)


class Expected(NamedTuple):
    """Results by name, and the largest logit: rounding errors are proportional to it."""

    values: dict[str, Tensor]
    scale: float


def expected(case: Case) -> Expected:
    """The results of an accepted call, by the reference."""
    a = {name: exact(value) for name, value in case.arguments.items()}
    if case.function == "credit_weights":
        return Expected({"weights": _credit(a)}, 1.0)
    hidden = a.get("hidden", a.get("student_hidden"))
    leading = hidden.shape[:-1]
    n, cu = leading.numel(), a.get("cu_seqlens")
    bounds = [0, n] if cu is None else cu.tolist()
    if len(leading) == 2:
        bounds = [i * leading[1] for i in range(leading[0] + 1)]
    flat = {name: x.reshape(n) if isinstance(x, Tensor) and x.shape == leading else x for name, x in a.items()}
    temperature = flat["temperature"]
    several = isinstance(temperature, Tensor) and temperature.dim() > 0
    options = (temperature if several else float(temperature)), number(flat["softcap"])

    def logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.logits(
            states.reshape(n, -1) if n else states.reshape(0, states.shape[-1]), weight, bias, *options
        )

    p = logits(hidden, a["weight"], a["bias"])
    values: dict[str, Tensor] = {}
    ignored = flat.get("ignore_index", IGNORED)
    mask = torch.ones(n, dtype=torch.bool) if flat.get("mask") is None else flat["mask"] != 0
    targets = flat.get("targets")
    if targets is not None:
        targets = targets.long()
        mask &= targets != ignored
        targets = targets.masked_fill(~mask, 0)

    def where_computed(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0)

    scale = _largest(p[mask])
    if case.function == "linear_logprob":
        values = dict(zip(("logp", "entropy", "lse"), map(where_computed, reference.logprob(p, targets))))
        return Expected(values, scale)
    q = None
    if a.get("teacher_hidden") is not None:
        own_bias = (
            a["bias"] if a.get("teacher_weight") is None and a.get("teacher_bias") is None else a.get("teacher_bias")
        )
        weight = a["weight"] if a.get("teacher_weight") is None else a["teacher_weight"]
        q = logits(a["teacher_hidden"], weight, own_bias)
        scale = max(scale, _largest(q[mask]))
    beta = a.get("beta")
    if case.function == "linear_divergence":
        values = {"reverse_kl": reference.kl(p, q), "forward_kl": reference.kl(q, p)}
        values |= {"bhattacharyya": reference.bhattacharyya(p, q)}
        values |= {
            "student_entropy": reference.logprob(p, targets)[1],
            "teacher_logp": reference.logprob(q, targets)[0],
        }
        if "jsd" in a["features"]:
            values["jsd"] = reference.jsd(p, q, float(beta))
        if "tv" in a["features"]:
            values["tv"] = reference.tv(p, q)
        if a["top_k"] is not None and n and not _tied(q, int(a["top_k"])):
            values["topk_reverse_kl"], values["topk_forward_kl"] = reference.topk_kl(p, q, targets, int(a["top_k"]))
        return Expected({name: where_computed(x) for name, x in values.items()}, scale)
    if case.function == "linear_distill_loss":
        each = {"reverse_kl": lambda: reference.kl(p, q), "forward_kl": lambda: reference.kl(q, p),
                "jsd": lambda: reference.jsd(p, q, float(beta))}[a["kind"]]()  # fmt: skip
        each = where_computed(each)
        total = each.sum()
        reduced = {"none": each, "sum": total, "mean": total / mask.sum().clamp(min=1)}
        return Expected({"loss": reduced[a["reduction"]]}, scale)
    policy = {
        "loss_type": str(a["loss_type"]), "epsilon": float(a["epsilon"]), "epsilon_high": number(a["epsilon_high"]),
        "old_logp": flat["old_logp"], "importance_weights": flat["importance_weights"],
        "ref_logp": flat.get("ref_logp"), "beta": float(flat.get("beta", 0.0)),
        "num_items_in_batch": number(a["num_items_in_batch"]),
    }  # fmt: skip
    advantages = _per_token(flat["advantages"], leading, bounds)
    logp = reference.logprob(p, targets)[0]
    if case.function == "sgcd_loss" and q is not None:
        credit: Any = {name: flat[name] for name in ("turn_ids", "config")}
        credit["credit_mask"] = None if flat["credit_mask"] is None else flat["credit_mask"] != 0
        has_teacher = flat["has_teacher"]
        credit["has_teacher"] = None if has_teacher is None else _per_token(has_teacher, leading, bounds) != 0
        loss = reference.sgcd_loss(p, q, targets, advantages, bounds, mask, **credit, **policy)
    else:
        loss = reference.policy_loss(logp, advantages, mask, bounds, **policy)
    return Expected({"loss": loss}, scale)


def _tied(q: Tensor, k: int) -> bool:
    """Whether which vocab ids are the K likeliest is a matter of rounding."""
    best = q.sort(1, descending=True).values
    return k < q.shape[1] and bool((best[:, k - 1] - best[:, k] <= 1e-5 * best.abs().amax(1)).any())


def _largest(z: Tensor) -> float:
    """The largest of the finite values."""
    return float(z.abs().nan_to_num(nan=0.0, posinf=0.0).max()) if z.numel() else 0.0


def _per_token(x: Tensor, leading: torch.Size, bounds: list[int]) -> Tensor:
    if x.shape in (leading, (leading.numel(),)):  # per token where both fit, as in the library
        return x.reshape(-1)
    return torch.cat([value.repeat(stop - start) for value, (start, stop) in zip(x, pairwise(bounds))]) if len(x) else x


def _credit(a: Arguments) -> Tensor:
    signals = {name: x for name, x in a.items() if name not in ("cu_seqlens", "mask", "impl", "advantages")}
    bounds = a["cu_seqlens"].tolist()
    mask = None if a["mask"] is None else a["mask"] != 0
    advantages = None if a["advantages"] is None else _per_token(a["advantages"], a["divergence"].shape, bounds)
    return reference.credit_weights(cu_seqlens=bounds, mask=mask, advantages=advantages, **signals)[0]


def differs(case: Case, out: Any) -> str | None:
    """How the results of an accepted call differ from the reference's."""
    if any(isinstance(x, Tensor) and x.is_meta for x in case.arguments.values()):
        main = case.arguments.get("hidden", case.arguments.get("student_hidden", case.arguments.get("divergence")))
        return None if main.is_meta else "a tensor on meta was accepted"
    want = expected(case)
    named = out._asdict() if hasattr(out, "_asdict") else {"loss": out[0] if isinstance(out, tuple) else out}
    # fp64 inputs leave no excuse, but rounding in the 7th digit is the same at every scale.
    rtol, atol = 2e-3, 2e-5 * (1 + want.scale)
    if case.function == "sgcd_loss":  # weights amplify the rounding of small divergences
        atol *= 50
    for name, value in want.values.items():
        if name.startswith("topk") and want.scale > 80:  # the tail's probability is 0 in fp32
            continue
        ours = named[name].detach().double().reshape(-1)
        value = value.double().reshape(-1)
        if ours.shape != value.shape:
            return f"{name} has {ours.numel()} values, not {value.numel()}"
        seen = value.isfinite() & (value.abs() < 1e30)
        if want.scale > 1e5:  # logits are rounded by more than ties take
            if ours[seen].isnan().any():
                return f"{name} is NaN"
        elif not torch.allclose(ours[seen], value[seen], rtol=rtol, atol=atol):
            at = int((ours - value).abs().masked_fill(~seen, 0).nan_to_num(nan=math.inf).argmax())
            return f"{name} is {float(ours[at])}, not {float(value[at])}"
    return None


def outcome(case: Case) -> tuple[str, str]:
    """("refused" | "right" | "made" | "wrong" | "raised", what happened)"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = FUNCTIONS[case.function](**case.arguments)
    except ValueError as error:
        named = any(name in str(error) for name in [*case.arguments, "teacher_weight", "ref_logp", "hidden", "impl"])
        return ("refused", "") if named else ("raised", f"a ValueError that names no argument: {error}")
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"
    if case.function in ("CreditConfig", "FusedLinearSGCDLoss"):
        return "made", ""
    problem = differs(case, out)
    return ("right", "") if problem is None else ("wrong", problem)


def fuzz(calls: int, seed: int) -> tuple[Counter[str], list[str]]:
    """(how many calls had which outcome, those with another than "refused", "right" and "made")"""
    found: Counter[str] = Counter()
    problems = []
    for i in range(calls):
        r = random.Random(f"{seed} {i}")
        case = a_case(r)
        if r.random() < 0.6:
            case = spoil(case, r)
        kind, what = outcome(case)
        found[kind] += 1
        if kind in ("wrong", "raised"):
            problems.append(f"call {i} of seed {seed}: {case.function}: {what[:300]}")
    return found, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    options = parser.parse_args()
    began = time.perf_counter()
    found, problems = fuzz(options.calls, options.seed)
    print(*problems[:40], sep="\n")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
    print(f"seed {options.seed}: {counts}; {time.perf_counter() - began:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
