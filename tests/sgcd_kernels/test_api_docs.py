"""The docstrings tell the truth: their examples run, and cost, gradients and the page made of them are measured."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import runpy
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import sgcd_kernels
from sgcd_kernels import linear_distill_loss, linear_divergence, linear_logprob, linear_policy_loss, sgcd_loss
from sgcd_kernels.ops.policy_inputs import Settings

ROOT = Path(__file__).resolve().parents[2]
api = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "api.py")))
INTEGRATIONS = ("cut_cross_entropy", "liger", "verl.linear_cross_entropy")
MODULES = [
    *sorted({getattr(sgcd_kernels, name).__module__ for name in sgcd_kernels.__all__} - {"sgcd_kernels.credit.rules"})
]

N, H, V = 96, 16, 500
G = torch.Generator().manual_seed(0)
X, T = (torch.randn(N, H, generator=G) for _ in range(2))
W, B = torch.randn(V, H, generator=G), torch.randn(V, generator=G)
Y, CU = torch.randint(V, (N,), generator=G), torch.tensor([0, 40, N])
ADVANTAGES, TURNS = torch.tensor([1.0, -1.0]), torch.zeros(N)


@pytest.mark.parametrize("module", [*MODULES, *(f"sgcd_kernels.integrations.{name}" for name in INTEGRATIONS)])
def test_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0 and found.failed == 0


def test_every_public_name_has_an_example() -> None:
    results = {"Credit", "DivergenceStats", "LogprobStats", "PackedTokens"}
    bare = [name for name in sgcd_kernels.__all__ if ">>>" not in (getattr(sgcd_kernels, name).__doc__ or "")]
    assert set(bare) == results


def test_the_page_is_fresh() -> None:
    assert api.PAGE.read_text() == api.page(), "run python docs/api.py"


def test_every_tensor_argument_says_its_shape() -> None:
    for name in api.OPS:
        tensors = [argument for argument in api.arguments(getattr(sgcd_kernels, name)) if "Tensor" in argument.kind]
        assert not [argument for argument in tensors if not argument.comment], name


def test_keywords_of_a_bundle_have_the_defaults_of_the_call() -> None:
    settings = Settings.of("linear_policy_loss", W, {})
    want = vars(settings.policy) | vars(settings.head) | {"ignore_index": settings.ignore_index, "impl": settings.impl}
    for function in (linear_policy_loss, sgcd_loss):
        said = {argument.name: argument.default for argument in api.arguments(function)}
        assert {name: said[name] for name in want if name != "weight"} == {
            name: repr(value) for name, value in want.items() if name != "weight"
        }


def test_public_functions_are_typed_throughout() -> None:
    for name in sgcd_kernels.__all__:
        public: Any = getattr(sgcd_kernels, name)
        for function in (public.__init__, public.forward) if hasattr(public, "forward") else (public,):
            hints = typing.get_type_hints(function)
            if inspect.isfunction(function):
                assert set(inspect.signature(function).parameters) - {"self"} <= set(hints) and "return" in hints, name


def distill(kind: str) -> Callable[..., torch.Tensor]:
    return lambda x, w, b: linear_distill_loss(x, w, T, bias=b, kind=kind, impl="torch")


def scored(**options: Any) -> Callable[..., torch.Tensor]:
    return lambda x, w, b: linear_divergence(x, w, Y, T, bias=b, impl="torch", **options).reverse_kl


def policy(**options: Any) -> Callable[..., torch.Tensor]:
    return lambda x, w, b: linear_policy_loss(x, w, Y, ADVANTAGES, cu_seqlens=CU, bias=b, impl="torch", **options)[0]


def sgcd(**options: Any) -> Callable[..., torch.Tensor]:
    named = {"turn_ids": TURNS, "impl": "torch"} | options
    return lambda x, w, b: sgcd_loss(x, w, Y, T, ADVANTAGES, CU, bias=b, **named)[0]


CASES: dict[str, list[Callable[..., torch.Tensor]]] = {  # in the order of the clauses after "Cost:"
    "linear_logprob": [lambda x, w, b: linear_logprob(x, w, Y, bias=b, impl="torch").logp.sum()],
    "linear_divergence": [scored(), scored(features=("tv",)), scored(top_k=3)],
    "linear_policy_loss": [policy(), policy(lse=linear_logprob(X, W, Y, bias=B).lse)],
    "linear_distill_loss": [distill("reverse_kl"), distill("jsd"), distill("forward_kl")],
    "sgcd_loss": [sgcd(), sgcd(reuse_lse=False), sgcd(reuse_lse=True)],
}


def products(run: Callable[[], Any]) -> tuple[float, Any]:
    """(U, what `run` gives): the multiplications of matrices that PyTorch does meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        result = run()
    total = 0
    for event in record.events():
        if event.name in ("aten::mm", "aten::addmm_"):
            (rows, inner), (_, columns) = (
                event.input_shapes[-2:] if event.name == "aten::mm" else event.input_shapes[1:3]
            )
            total += rows * inner * columns
    return total / (N * H * V), result


@pytest.mark.parametrize("name", CASES)
def test_the_cost_is_what_the_docstring_says(name: str) -> None:
    said = re.findall(r"(\d) U forward, (\d) U backward", api.fact(getattr(sgcd_kernels, name), "Cost"))
    assert len(said) <= len(CASES[name]) <= len(said) + 1
    said.append(said[-1] if name == "linear_divergence" else said[0])  # the third case costs what another does
    for call, (forward, backward) in zip(CASES[name], said):
        leaves = [a.clone().requires_grad_() for a in (X, W, B)]
        cost, value = products(lambda call=call, leaves=leaves: call(*leaves))
        assert cost == pytest.approx(int(forward), abs=0.01)
        if value.requires_grad:
            cost, _ = products(value.backward)
        else:
            cost = 0.0
        assert cost == pytest.approx(int(backward), abs=0.01)


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_are_those_that_the_docstring_names(name: str) -> None:
    said = api.fact(getattr(sgcd_kernels, name), "Gradients")
    leaves = [a.clone().requires_grad_() for a in (X, W, B)]
    value = CASES[name][0](*leaves)
    if said == "none":
        assert not value.requires_grad
        return
    value.backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)
    assert said.removeprefix("student_") == "hidden, weight, bias"


def test_importing_is_fast() -> None:
    """Under 0.3 s beyond torch: the time of this process, so that other load on the machine does not count."""
    code = "import time, torch\nstart = time.process_time()\nimport sgcd_kernels\nprint(time.process_time() - start)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


def test_torch_alone_is_enough() -> None:
    """With every other package hidden the library imports, scores and trains, and reports what is missing."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'numpy', 'triton', 'peft', 'pydantic', 'trl', 'verl'):\n"
        "    sys.modules[name] = None\n"
        "import torch, sgcd_kernels\n"
        "from sgcd_kernels.integrations import cut_cross_entropy, liger, verl\n"
        "x, w = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)\n"
        "loss, _ = sgcd_kernels.sgcd_loss(x, w, torch.tensor([1, 2, 3]), torch.randn(3, 4), torch.ones(1),\n"
        "    torch.tensor([0, 3]), turn_ids=torch.zeros(3))\n"
        "loss.backward()\n"
        "assert x.grad.abs().sum() > 0\n"
        "assert not sgcd_kernels.backend_status()['triton'].usable\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)
