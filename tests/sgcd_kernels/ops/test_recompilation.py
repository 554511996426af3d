"""torch.compile compiles nothing anew for a value, and once more for a kind of number of tokens.

With `dynamic=True` Dynamo takes Python numbers as variables from the first call on, and without it from the second
different value on; tensors of one element it never compiles in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sgcd_kernels import (
    CreditConfig,
    FusedLinearSGCDLoss,
    PolicyLossConfig,
    credit_weights,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)
from sgcd_kernels.integrations.liger import LigerFusedLinearGRPOLoss, LigerFusedLinearSGCDLoss

H, V = 8, 60
G = torch.Generator().manual_seed(0)
X, W, T = torch.randn(12, H, generator=G), torch.randn(V, H, generator=G), torch.randn(12, H, generator=G)
Y, A, CU = torch.randint(V, (12,), generator=G), torch.randn(12, generator=G), torch.tensor([0, 5, 12])
OLD, D = torch.randn(12, generator=G) - 4, torch.rand(12, generator=G)
BATCH = X.view(2, 6, H), W, Y.view(2, 6), torch.ones(2, 6), A.view(2, 6)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def credit(**field: Any) -> Tensor:
    return credit_weights(D, D, CU, config=CreditConfig(**field)).weights


def with_credit(**field: Any) -> Tensor:
    config = CreditConfig(**{"d_floor": 1e-3, **field})
    return sgcd_loss(X, W, Y, T, A, CU, config=config, loss_type="dapo")[0]


def attributes(module: Any, *inputs: Any, **more: Any) -> Callable[..., Tensor]:
    def call(**values: Any) -> Tensor:
        for name, value in values.items():
            setattr(module, name, value)
        loss: Tensor = module(*inputs, **more)[0]
        return loss

    return call


def policy(**values: Any) -> Tensor:
    return linear_policy_loss(X, W, Y, A, old_logp=OLD, ref_logp=OLD, loss_type="dapo", **values)[0]


def of_config(**values: Any) -> Tensor:
    return linear_policy_loss(X, W, Y, A, policy=PolicyLossConfig("dapo", **values), old_logp=OLD)[0]


def divergence(**values: Any) -> Tensor:
    jsd = linear_divergence(X, W, Y, T, features=("jsd",), **values).jsd
    assert jsd is not None
    return jsd


def liger(loss: Any) -> Callable[..., Tensor]:
    return lambda **values: loss(*BATCH, ref_per_token_logps=OLD.view(2, 6), **values)[0]


LIGER_SGCD = LigerFusedLinearSGCDLoss()
TAUGHT = {"teacher_input": T.view(2, 6, H), "ref_per_token_logps": OLD.view(2, 6)}

# What is called, and the numbers that change from call to call, each with its values.
CALLS: dict[str, tuple[Callable[..., Tensor], dict[str, Sequence[float]]]] = {
    "logprob": (
        lambda **v: linear_logprob(X, W, Y, **v).logp,
        {"temperature": (0.7, 0.9, 1.0), "softcap": (5.0, 9.0, 30.0)},
    ),
    "divergence": (divergence, {"temperature": (0.7, 0.9, 1.0), "beta": (0.2, 0.5, 0.9)}),
    "distill": (
        lambda **v: linear_distill_loss(X, W, T, kind="jsd", **v),
        {"temperature": (0.7, 1.0, 3.0), "beta": (0.2, 0.5, 0.9)},
    ),
    "policy": (
        policy,
        {
            "num_items_in_batch": (5.0, 7.5, 100.0),
            "beta": (0.1, 0.2, 0.3),
            "epsilon": (0.1, 0.2, 0.3),
            "epsilon_high": (0.2, 0.3, 0.28),
            "temperature": (0.7, 1.0, 2.0),
        },
    ),
    "policy, whole numbers": (policy, {"num_items_in_batch": (5, 7, 100), "temperature": (2, 3, 4), "beta": (3, 4, 5)}),
    "policy of a config": (of_config, {"epsilon": (0.1, 0.2, 0.3), "num_items_in_batch": (5.0, 7.5, 100.0)}),
    "credit": (credit, {"gamma": (0.2, 0.5, 1.0), "d_floor": (0.01, 0.1, 0.2), "clip": (1.5, 2.0, 3.0)}),
    "sgcd": (with_credit, {"gamma": (0.2, 0.5, 1.0), "clip": (1.5, 1.7, 1.9)}),
    "module": (
        attributes(FusedLinearSGCDLoss(loss_type="dapo"), X, W, Y, T, A, CU, old_logp=OLD),
        {"temperature": (0.7, 1.0, 2.0), "epsilon": (0.1, 0.2, 0.3)},
    ),
    "liger": (liger(LigerFusedLinearGRPOLoss()), {"num_items_in_batch": (5.0, 7.0, 9.5)}),
    "liger, attributes": (
        attributes(LigerFusedLinearGRPOLoss(), *BATCH, ref_per_token_logps=OLD.view(2, 6)),
        {"temperature": (0.7, 1.0, 2.0), "beta": (0.02, 0.1, 2.0)},
    ),
    "liger sgcd": (lambda **v: LIGER_SGCD(*BATCH, **TAUGHT, **v)[0], {"num_items_in_batch": (5.0, 7.0, 9.5)}),
}


SLOW = ("module", "liger sgcd", "liger, attributes", "policy, whole numbers")
KINDS = [
    *((name, "variable") for name in CALLS if name not in SLOW),
    ("policy", "constant at first"),
    *((name, "tensor") for name in ("policy", "distill", "credit")),
    *(pytest.param(name, "variable", marks=pytest.mark.slow) for name in SLOW),
    pytest.param("module", "constant at first", marks=pytest.mark.slow),
    *(pytest.param(name, "tensor", marks=pytest.mark.slow) for name in ("logprob", "liger", "sgcd")),
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_no_value_is_compiled_in(name: str, kind: str) -> None:
    call, options = CALLS[name]
    each = [dict(zip(options, values)) for values in zip(*options.values(), strict=True)]
    if kind == "tensor":
        each = [{option: torch.tensor(value) for option, value in given.items()} for given in each]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=kind == "variable" or None)
    want = [call(**given) for given in each]
    for given in each[: 2 if kind == "constant at first" else 1]:
        compiled(**given)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = [compiled(**given) for given in each]
    assert all(torch.equal(ours, plain) for ours, plain in zip(got, want))
    assert not all(torch.equal(ours, got[0]) for ours in got)


def test_gradients_are_those_of_each_value() -> None:
    def call(x: Tensor, value: float) -> Tensor:
        return linear_logprob(x, W, Y, temperature=value).logp.sum() + linear_distill_loss(x, W, T, temperature=value)

    def gradient(function: Callable[..., Tensor], value: float) -> Tensor:
        x = X.clone().requires_grad_()
        function(x, value).backward()
        assert x.grad is not None
        return x.grad

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for value in (0.7, 0.9, 1.0, 2.0):
        assert torch.equal(gradient(compiled, value), gradient(call, value))


def test_one_more_compilation_for_another_number_of_tokens_and_of_sequences() -> None:
    def call(n: int, sequences: int) -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(n)
        x, t, a = (torch.randn(*shape, generator=g) for shape in ((n, H), (n, H), (sequences,)))
        return x, W, torch.randint(V, (n,), generator=g), t, a, torch.arange(sequences + 1) * (n // sequences)

    compiled = torch.compile(lambda *batch: sgcd_loss(*batch)[0], backend="aot_eager", fullgraph=True)
    for n, sequences in ((12, 3), (20, 4)):
        compiled(*call(n, sequences))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n, sequences in ((30, 5), (14, 2), (100, 10), (21, 3)):
            compiled(*call(n, sequences))


def test_a_value_out_of_range_is_refused_there_too() -> None:
    compiled = torch.compile(CALLS["logprob"][0], backend="aot_eager", fullgraph=True)
    compiled(temperature=torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"temperature is 0.0, needs a finite number in \[1e-20, 1e\+20\]"):
        compiled(temperature=torch.tensor(0.0))
