"""`impl=` is obeyed by credit, alone and inside sgcd_loss: the compiled operators run where they are asked for only."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sgcd_kernels import CreditConfig, backend_status, credit_weights, sgcd_loss
from sgcd_kernels.backends import registry

CPP = backend_status()["cpp"]
COMPILED = {"find_spans", "order_statistics"}  # operators of csrc/ that credit uses
OWN = {"batch", "credit", "divergence", "masked_mean", "policy_loss", "weigh"}  # ops that are written in Python
N, CU = 40, torch.tensor([0, 15, 40])


def credit(impl: str, rule: str = "sgcd") -> Any:
    g = torch.Generator().manual_seed(0)
    signals = {name: torch.rand(N, generator=g) for name in ("log_ratio", "forward_kl", "bhattacharyya")}
    signals |= {"advantages": torch.ones(N), "student_entropy": torch.ones(N)}
    d, h = torch.rand(N, generator=g) ** 4, torch.rand(N, generator=g)
    config = CreditConfig(rule=rule)  # type: ignore[arg-type]
    return credit_weights(d, h, CU, turn_ids=torch.arange(N) // 9, **signals, config=config, impl=impl)


def loss(impl: str, rule: str = "sgcd") -> Any:
    g = torch.Generator().manual_seed(0)
    x, w, t = (torch.randn(n, 8, generator=g) for n in (N, 30, N))
    batch = x, w, torch.arange(N) % 30, t, torch.ones(2), CU
    return sgcd_loss(*batch, turn_ids=torch.arange(N) // 9, config=CreditConfig(rule=rule), impl=impl)[0]  # type: ignore[arg-type]


def operators(call: Any, *arguments: str) -> set[str]:
    """The names of the library's operators that ran."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call(*arguments)
    prefix = "sgcd_kernels::"
    return {event.name.removeprefix(prefix) for event in record.events() if event.name.startswith(prefix)}


@pytest.mark.parametrize("rule", ["sgcd", "gear", "sc_grpo", "turn_level", "permuted", "matched_uniform"])
@pytest.mark.parametrize("call", [credit, loss])
def test_torch_runs_no_compiled_operator(call: Any, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked of another backend")

    for name in ("cpp", "triton"):
        monkeypatch.setitem(registry._FOLDERS, name, Refuses())  # type: ignore[arg-type]
    assert operators(call, "torch", rule) <= OWN


@pytest.mark.skipif(not CPP.usable, reason=CPP.reason)
@pytest.mark.parametrize("impl", ["cpp", "auto"])
@pytest.mark.parametrize("call", [credit, loss])
def test_cpp_runs_its_scan_and_its_sort(call: Any, impl: str) -> None:
    assert operators(call, impl) >= COMPILED
    assert COMPILED & operators(call, impl, "sc_grpo") == {"order_statistics"}


@pytest.mark.skipif(not CPP.usable, reason=CPP.reason)
@pytest.mark.parametrize("rule", ["sgcd", "gear", "permuted"])
def test_both_give_the_same_bits(rule: str) -> None:
    for ours, plain in zip(credit("cpp", rule), credit("torch", rule), strict=True):
        assert torch.equal(ours, plain)


def test_a_backend_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = dataclasses.replace(registry._BACKENDS["triton"], unavailable_reason=lambda: "there is none")
    monkeypatch.setitem(registry._BACKENDS, "triton", entry)
    monkeypatch.setattr(registry, "triton_unavailable_reason", lambda: "there is none")
    with pytest.raises(
        ValueError, match="impl is 'triton', which cannot run credit rules here: there is none; needs an"
    ):
        credit("triton")
    with pytest.raises(ValueError, match="impl is 'triton', which cannot run divergence_forward here: there is none"):
        loss("triton")
    with pytest.raises(ValueError, match="impl is 'trition', needs one of auto, triton, cpp, torch; did you mean"):
        credit("trition")
