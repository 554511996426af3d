"""Ops made of functions on bundles: what goes in comes back equal, and gradients find their inputs by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sgcd_kernels.core.registration import register, restore, save


@dataclass(frozen=True)
class Inner:
    x: Tensor
    optional: Tensor | None = None
    scale: float = 1.0
    factor: float | Tensor = 1.0


class Everything(NamedTuple):
    """One field of every kind that an op may take."""

    tensor: Tensor
    inner: Inner
    optional: Tensor | None = None
    number: float = 0.5
    optional_number: float | None = None
    integer: int = 3
    optional_integer: int | None = None
    flag: bool = False
    name: str = "name"
    choice: Literal["onset", "own"] = "own"
    names: tuple[str, ...] = ()
    mixed: float | Tensor = 2.0
    optional_mixed: float | Tensor | None = None
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class Parts:
    x: Tensor
    optional: Tensor | None


class Doubled(NamedTuple):
    """What `double_op` gives: results are tensors, None, and bundles of these."""

    tensor: Tensor
    optional: Tensor | None
    parts: Parts
    count: Tensor


received: list[Any] = []


def double(value: Everything, extra: Tensor | None) -> Doubled:
    parts = Parts(2 * value.inner.x, None if value.optional is None else 2 * value.optional)
    return Doubled(2 * value.tensor, None if extra is None else 2 * extra, parts, torch.tensor(7))


class Inputs(NamedTuple):
    inner: Inner
    weight: Tensor


class Outputs(NamedTuple):
    product: Tensor
    total: Tensor | None
    norm: Tensor


def multiply(inputs: Inputs, bias: Tensor | None, factor: float) -> Outputs:
    product = inputs.inner.x * inputs.weight * factor
    total = None if bias is None else product + bias
    return Outputs(product, total, product.norm())


def keep(ctx: Any, result: Outputs, inputs: Inputs, bias: Tensor | None, factor: float) -> None:
    save(ctx, inputs=inputs, result=result, bias=bias, factor=factor)


def by_name(ctx: Any, upstream: Outputs) -> dict[str, Tensor | None]:
    at = restore(ctx)
    received.append((at, dict(ctx.needs), upstream))
    up = sum(x for x in upstream[:2] if x is not None)
    x, weight = at.inputs.inner.x, at.inputs.weight
    return {"bias": upstream.total, "inputs_weight": up * x * at.factor, "inputs_inner_x": up * weight * at.factor}


def misspelt(ctx: Any, upstream: Tensor) -> dict[str, Tensor | None]:
    return {"y": upstream}


@register(lambda value: 2 * value)
def test_registration_plain_op(value: Tensor) -> Tensor:
    return 2 * value


@register(lambda value: 2 * value, lambda *_: None, misspelt)
def test_registration_misspelt_op(x: Tensor) -> Tensor:
    return 2 * x


@register(double)
def test_registration_double_op(value: Everything, extra: Tensor | None) -> Doubled:
    received.append(value)
    return double(value, extra)


@register(multiply, keep, by_name, differentiable=("product", "total"))
def test_registration_multiply_op(inputs: Inputs, bias: Tensor | None, factor: float) -> Outputs:
    return multiply(inputs, bias, factor)


plain_op, misspelt_op = test_registration_plain_op, test_registration_misspelt_op
double_op, multiply_op = test_registration_double_op, test_registration_multiply_op
for op in (plain_op, misspelt_op, double_op, multiply_op):
    op.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def nothing_received() -> None:
    received.clear()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and hasattr(a, "_fields"):
        return type(a) is type(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (Inner, Parts)):
        return type(a) is type(b) and all(same(getattr(a, k), getattr(b, k)) for k in vars(a))
    return type(a) is type(b) and bool(a == b)


PLAIN = Everything(torch.arange(3.0), Inner(torch.ones(2)))
CASES = {
    "defaults": PLAIN,
    "all given": PLAIN._replace(
        inner=Inner(torch.ones(2), torch.zeros(1), 0.25, torch.tensor([1.0, 2.0])),
        optional=torch.tensor([5, 6]),
        optional_number=1.5,
        optional_integer=-(2**62),
        flag=True,
        name="a, b",
        choice="onset",
        names=("jsd", "tv"),
        mixed=torch.rand(3),
        optional_mixed=-1.5,
    ),
    "optional mixed tensor": PLAIN._replace(optional_mixed=torch.rand(2), names=("jsd",)),
    "0-dimensional": PLAIN._replace(tensor=torch.tensor(2.0)),
    "empty tensors": PLAIN._replace(optional=torch.zeros(0), tensor=torch.zeros(0, 4), name=""),
    "infinite": PLAIN._replace(number=float("inf"), optional_mixed=float("-inf")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("extra", [None, torch.arange(2)])
def test_a_bundle_of_every_kind_comes_back_equal(case: str, extra: Tensor | None) -> None:
    result = double_op(CASES[case], extra)
    assert same(received[0], CASES[case])
    assert same(result, double(CASES[case], extra))


def test_whole_numbers_become_floats_where_a_float_is_meant() -> None:
    double_op(PLAIN._replace(number=2, optional_number=3, mixed=4), None)
    assert same(received[0], PLAIN._replace(number=2.0, optional_number=3.0, mixed=4.0))


def test_a_tensor_of_one_element_is_read_where_a_float_is_meant() -> None:
    half, one = torch.tensor(0.5), torch.tensor([1], dtype=torch.int8)
    inner = Inner(torch.ones(2), scale=half, factor=one)  # type: ignore[arg-type]
    double_op(PLAIN._replace(inner=inner, mixed=half, optional_number=half), None)  # type: ignore[arg-type]
    assert same(received[0], PLAIN._replace(inner=Inner(torch.ones(2), scale=0.5), mixed=0.5, optional_number=0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1e308])
def test_no_value_of_a_tensor_is_taken_for_none(value: float) -> None:
    double_op(PLAIN._replace(optional_number=torch.tensor(value, dtype=torch.float64)), None)  # type: ignore[arg-type]
    assert str(received[0].optional_number) == str(value)


def test_bodies_get_contiguous_tensors_and_rows_where_they_lie() -> None:
    square = torch.arange(16.0).view(4, 4)
    for x, stays in ((square, True), (square[:, :2], True), (square[1:], True), (square[::2], True),
                     (square.t(), False), (square[:, ::2], False), (square[:1].expand(4, 4), False)):  # fmt: skip
        double_op(PLAIN._replace(tensor=x), square.view(2, 2, 4)[:, :, 1])
        got = received.pop().tensor
        assert torch.equal(got, x)
        assert (got.data_ptr() == x.data_ptr() and got.stride() == x.stride()) == stays
        assert stays or got.is_contiguous()


def test_a_tensor_on_meta_among_others_is_refused() -> None:
    with pytest.raises(ValueError, match="test_registration_double got a tensor on meta, needs all on cpu"):
        double_op(PLAIN, torch.ones(2, device="meta"))
    result = double_op(PLAIN._replace(tensor=torch.ones(3, device="meta"), inner=Inner(torch.ones(2))), None)
    assert result.tensor.is_meta


def test_one_tensor_is_a_result_too() -> None:
    assert torch.equal(plain_op(torch.ones(2)), torch.full((2,), 2.0))


def test_the_schema_names_every_flat_argument() -> None:
    schema = str(torch.ops.sgcd_kernels.test_registration_double.default._schema)
    flat = ("Tensor value_tensor, Tensor value_inner_x, Tensor? value_inner_optional, Tensor? value_inner_factor, "
            "Tensor? value_optional, ")  # fmt: skip
    assert flat in schema
    assert (
        "SymInt? value_optional_integer, bool value_flag, str value_name, str value_choice, str value_names" in schema
    )
    assert "str value_group, Tensor? extra, bool[] given, float[] numbers, Tensor? traced_numbers" in schema


@pytest.fixture
def group(tmp_path: Path) -> Iterator[ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_process_group_comes_back_itself(group: ProcessGroup) -> None:
    double_op(PLAIN._replace(group=group), None)
    assert received[0].group is group


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group is a str, needs a torch"):
        double_op(PLAIN._replace(group="tp"), None)  # type: ignore[arg-type]


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = (torch.randn(3, dtype=torch.float64).requires_grad_() for _ in range(3))
    return x, weight, bias


def test_gradients_find_their_inputs_by_name() -> None:
    x, weight, bias = leaves()
    for needs in ((True, True, True), (True, False, False), (False, True, True), (False, False, True)):
        inputs = [leaf.detach().requires_grad_(need) for leaf, need in zip((x, weight, bias), needs)]
        result = multiply_op(Inputs(Inner(inputs[0], factor=torch.ones(3)), inputs[1]), inputs[2], 1.5)
        assert result.total is not None and result.total.requires_grad
        assert not result.norm.requires_grad  # as `differentiable` says
        plain = multiply(Inputs(Inner(inputs[0]), inputs[1]), inputs[2], 1.5)
        wanted = [leaf for leaf in inputs if leaf.requires_grad]
        ours = torch.autograd.grad((result.product * 2 + result.total).sum(), wanted)
        assert plain.total is not None
        for a, b in zip(ours, torch.autograd.grad((plain.product * 2 + plain.total).sum(), wanted), strict=True):
            torch.testing.assert_close(a, b)
        _, flags, _ = received.pop()
        assert [flags[name] for name in ("inputs_inner_x", "inputs_weight", "bias")] == list(needs)
        assert not flags["inputs_inner_factor"] and not flags["numbers"]


def test_what_was_kept_comes_back_by_name_and_upstream_has_the_form_of_the_result() -> None:
    x, weight, _ = leaves()
    inputs = Inputs(Inner(x, scale=0.25, factor=3.0), weight)
    result = multiply_op(inputs, None, 1.5)
    assert result.total is None
    result.product.sum().backward()
    ((at, _, upstream),) = received
    assert same(at.inputs, Inputs(Inner(x, scale=0.25, factor=3.0), weight))
    assert (at.bias, at.factor) == (None, 1.5) and torch.equal(at.result.product, result.product)
    assert isinstance(upstream, Outputs) and torch.equal(upstream.product, torch.ones(3, dtype=torch.float64))
    assert upstream.total is None and upstream.norm is None


def test_an_input_that_changes_before_backward_is_noticed() -> None:
    x, weight, bias = leaves()
    factor = torch.ones(3)
    result = multiply_op(Inputs(Inner(x, factor=factor), weight), bias, 1.0)
    factor.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.product.sum().backward()


def test_tensors_made_in_inference_mode_are_kept_as_copies() -> None:
    x, _, _ = leaves()
    with torch.inference_mode():
        weight, factor = torch.arange(3.0).double(), torch.ones(3)
    result = multiply_op(Inputs(Inner(x, factor=factor), weight), None, 2.0)
    (grad,) = torch.autograd.grad(result.product.sum(), x)
    assert torch.equal(grad, 2 * torch.arange(3.0).double())
    assert not received[0][0].inputs.weight.is_inference()


def test_a_gradient_of_an_unknown_name_is_a_mistake_that_shows() -> None:
    with pytest.raises(AssertionError, match="y"):
        misspelt_op(torch.ones(2, requires_grad=True)).sum().backward()


def test_a_second_derivative_is_refused() -> None:
    x, weight, bias = leaves()
    result = multiply_op(Inputs(Inner(x), weight), bias, 1.0)
    (grad,) = torch.autograd.grad((result.product**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_second_derivative_is_refused_where_a_constant_would_be_added() -> None:
    """Of a sum the incoming gradient needs none itself, so that the first one would count as a constant."""
    x, weight, bias = leaves()
    (grad,) = torch.autograd.grad(multiply_op(Inputs(Inner(x), weight), bias, 1.0).product.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="sgcd_kernels::test_registration_multiply has no second derivative"):
        (grad.sum() + x.sum()).backward()


@pytest.mark.parametrize("optional", [False, True])
def test_what_torch_library_asks_of_an_op(optional: bool) -> None:
    x, weight, bias = (leaf.detach().requires_grad_() for leaf in leaves())
    flat = x, None, None, weight, bias if optional else None
    numbers, given = [1.0, 1.0, 1.5], [True, True, True]
    torch.library.opcheck(
        torch.ops.sgcd_kernels.test_registration_multiply.default, (*flat, given, [], torch.tensor(numbers).double())
    )
    flat = *flat, given, numbers, None
    torch.library.opcheck(torch.ops.sgcd_kernels.test_registration_multiply.default, flat)


def test_it_compiles_into_one_graph() -> None:
    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        outputs = multiply_op(Inputs(Inner(x, factor=0.5), weight), None, 1.5)
        doubled = double_op(PLAIN._replace(tensor=x.detach(), inner=replace(PLAIN.inner, x=weight.detach())), None)
        assert outputs.total is None and doubled.optional is None
        return outputs.product, doubled.tensor

    x, weight, _ = leaves()
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for ours, plain in zip(compiled(x, weight), call(x, weight), strict=True):
        assert torch.equal(ours, plain)
    (ours,) = torch.autograd.grad(compiled(x, weight)[0].sum(), x)
    assert torch.equal(ours, 1.5 * weight)
