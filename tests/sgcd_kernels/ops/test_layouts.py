"""Every op on every layout of every tensor argument: the contiguous call's bits, gradients of strided leaves too."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sgcd_kernels import (
    CreditConfig,
    FusedLinearSGCDLoss,
    credit_weights,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)
from sgcd_kernels.integrations.cut_cross_entropy import linear_cross_entropy
from sgcd_kernels.integrations.liger import LigerFusedLinearGRPOLoss, LigerFusedLinearSGCDLoss
from tests.sgcd_kernels.backends.cases import DEVICES

Tensors = dict[str, Tensor]
N, H, V = 12, 8, 70
CREDIT = CreditConfig(d_floor=1e-3)


def inputs() -> Tensors:
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "hidden": rand(N, H),
        "weight": rand(V, H),
        "bias": rand(V),
        "targets": torch.randint(V, (N,), generator=g),
        "teacher_hidden": rand(N, H),
        "teacher_weight": rand(V, H),
        "teacher_bias": rand(V),
        "advantages": rand(N),
        "old_logp": rand(N) - 4,
        "ref_logp": rand(N) - 4,
        "importance_weights": rand(N).abs(),
        "mask": torch.arange(N) % 5 != 4,
        "credit_mask": torch.arange(N) % 7 != 3,
        "has_teacher": torch.arange(N) % 6 != 5,
        "turn_ids": torch.arange(N) // 4,
        "temperature": rand(N).abs() + 0.5,
        "cu_seqlens": torch.tensor([0, 5, N]),
        "lse": rand(N).abs() + 5,
        "divergence": rand(N).abs(),
        "teacher_entropy": rand(N).abs(),
        "log_ratio": rand(N),
        "forward_kl": rand(N).abs(),
        "bhattacharyya": rand(N).abs().clamp(max=1),
        "student_entropy": rand(N).abs(),
    }


def rows(x: Tensor) -> Tensor:
    """Packed tokens as [B, T, ...]."""
    return x.unflatten(0, (2, -1)) if x.shape[0] == N else x


def named(function: Callable[..., Any], names: str, **options: Any) -> tuple[Callable[..., Any], list[str]]:
    return lambda given, impl: function(**given, **options, impl=impl), names.split()


PAIR = "teacher_hidden teacher_weight teacher_bias"
HEAD = "hidden weight bias targets temperature"
LOSS = f"{HEAD} advantages old_logp ref_logp importance_weights mask"
SIGNALS = "divergence teacher_entropy advantages log_ratio forward_kl bhattacharyya student_entropy mask turn_ids"


def renamed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda hidden, **given: function(student_hidden=hidden, **given)


def module(**given: Any) -> Any:
    weight, impl = given.pop("weight"), given.pop("impl")
    return FusedLinearSGCDLoss(config=CREDIT, impl=impl)(lm_weight=weight, **given)


def liger(credit: bool) -> Callable[..., Any]:
    def call(impl: str, **g: Any) -> Any:
        batch = rows(g["hidden"]), g["weight"], rows(g["targets"]), rows(g["mask"]), rows(g["advantages"]), g["bias"]
        more = {"old_per_token_logps": rows(g["old_logp"]), "vllm_is_ratio": rows(g["importance_weights"])}
        more["ref_per_token_logps"] = rows(g["ref_logp"])
        if not credit:
            return LigerFusedLinearGRPOLoss(impl=impl)(*batch, **more)
        teacher = {"teacher_input": rows(g["teacher_hidden"]), "teacher_weight": g["teacher_weight"]}
        more |= {"turn_ids": rows(g["turn_ids"]), "credit_mask": rows(g["credit_mask"])}
        return LigerFusedLinearSGCDLoss(config=CREDIT, impl=impl)(*batch, **more, **teacher)

    return call


def cross_entropy(impl: str, **g: Any) -> Any:
    return linear_cross_entropy(g["hidden"], g["weight"], g["targets"], bias=g["bias"], impl=impl)


def by_rows(hidden: Tensor, weight: Tensor, targets: Tensor, impl: str) -> Any:
    return linear_logprob(rows(hidden), weight, rows(targets), impl=impl)


OPS = {
    "logprob": named(linear_logprob, HEAD, softcap=9.0),
    "logprob of rows": named(by_rows, "hidden weight targets"),
    "divergence": named(renamed(linear_divergence), f"{HEAD} {PAIR}"),
    "divergence, two passes": named(renamed(linear_divergence), f"{HEAD} {PAIR}", features=("jsd", "tv"), top_k=3),
    "policy": named(linear_policy_loss, f"{LOSS} cu_seqlens", beta=0.1),
    "policy, known lse": named(linear_policy_loss, "hidden weight targets advantages cu_seqlens lse"),
    "distill": named(renamed(linear_distill_loss), f"hidden weight bias temperature mask {PAIR}"),
    "distill jsd": named(renamed(linear_distill_loss), f"hidden weight mask {PAIR}", kind="jsd", reduction="none"),
    "sgcd": named(sgcd_loss, f"{LOSS} cu_seqlens {PAIR} has_teacher credit_mask turn_ids", beta=0.1, config=CREDIT),
    "module": named(module, f"hidden weight targets advantages cu_seqlens {PAIR} turn_ids"),
    **{
        f"credit, {rule}": named(credit_weights, f"{SIGNALS} cu_seqlens", config=CreditConfig(rule=rule))  # type: ignore[arg-type]
        for rule in ("sgcd", "gear", "dgpo", "turn_level", "permuted", "sc_grpo")
    },
    "liger": named(liger(False), f"{LOSS}".replace("temperature", "")),
    "liger sgcd": named(liger(True), f"{LOSS} {PAIR} turn_ids credit_mask".replace("temperature", "")),
    "cross-entropy": named(cross_entropy, "hidden weight bias targets"),
}


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t() if x.dim() == 2 else every_second(x)


def every_second(x: Tensor) -> Tensor:
    """The last dimension has stride 2."""
    return torch.stack([x, torch.zeros_like(x)], -1).flatten(-2)[..., ::2]


def every_second_row(x: Tensor) -> Tensor:
    return torch.stack([x, torch.zeros_like(x)], 1).flatten(0, 1)[::2]


def columns(x: Tensor) -> Tensor:
    """The first columns of a wider matrix."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def offset(x: Tensor) -> Tensor:
    """Contiguous, one element beyond an aligned address."""
    return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape)


def overlapping(x: Tensor) -> Tensor:
    """Rows that begin one element after another."""
    return x.reshape(-1)[: x.shape[0] + x.shape[-1] - 1].as_strided(x.shape, (1,) * x.dim())


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def negated(x: Tensor) -> Tensor:
    return torch._neg_view(-x) if x.is_floating_point() else offset(x)


LAYOUTS = (transposed, every_second, every_second_row, columns, offset, overlapping, expanded, negated)
LEAVES = ("hidden", "weight", "bias")


def results(op: str, impl: str, given: Tensors) -> list[Tensor]:
    """Results, and the gradients of hidden, weight and bias."""
    call, _ = OPS[op]
    given = {name: x.detach().requires_grad_(name in LEAVES) for name, x in given.items()}
    out = call(given, impl)
    flat = [out] if isinstance(out, Tensor) else [x for x in (*out,) if isinstance(x, Tensor)]
    for part in out if isinstance(out, tuple) else ():
        flat += list(part.values()) if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else []
    seeds = [x for x in flat if x.requires_grad]
    if seeds:
        torch.autograd.backward(seeds, [torch.full_like(x, 1 / 3) for x in seeds])
    grads = [given[name].grad for name in LEAVES if name in given]
    return [x.detach() for x in flat] + [x for x in grads if x is not None]


def each_layout(op: str, given: Tensors) -> Iterator[tuple[str, Tensors, Tensors]]:
    """(what it is, contiguous inputs, the same with one argument in another layout)"""
    for name in given:
        for layout in LAYOUTS:
            if name == "cu_seqlens" and layout in (expanded, overlapping):
                continue
            view = layout(given[name])
            yield (
                f"{op}: {layout.__name__} {name}",
                given | {name: view.clone(memory_format=torch.contiguous_format)},
                given | {name: view},
            )


def sampled(what: str, impl: str) -> bool:
    """Triton's interpreter is slow: one call of 24."""
    return impl != "triton" or zlib.crc32(what.encode()) % 24 == 0


@pytest.mark.parametrize("impl", ["torch", "cpp", "triton"], indirect=True)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_layout(op: str, impl: str) -> None:
    device = DEVICES.get(impl, "cpu")
    _, names = OPS[op]
    given = {name: x.to(device) for name, x in inputs().items() if name in names}
    for what, plain, strided in each_layout(op, given):
        if sampled(what, impl):
            want, got = results(op, impl, plain), results(op, impl, strided)
            assert len(want) == len(got) > 0
            for a, b in zip(want, got):
                assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()), what
