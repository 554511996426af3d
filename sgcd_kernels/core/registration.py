"""Registers a function on bundles (`LMHead`, `PolicyLossConfig`, ...) as an op of torch.library.

The dispatcher takes flat lists of tensors and plain values. `register` derives them from the annotations of the body:
each bundle is flattened into its fields, named `<argument>_<field>`, and rebuilt for the body, its fake kernel and its
backward pass, so that none of them counts positions. For example

    logprob_op(hidden: Tensor, head: LMHead, targets: Tensor, ignore_index: int, impl: str) -> LogprobStats

is registered as

    logprob(Tensor hidden, Tensor head_weight, Tensor? head_bias, Tensor? head_temperature, str head_group,
            Tensor targets, SymInt ignore_index, str impl, bool[] given, float[] numbers,
            Tensor? traced_numbers)
        -> (Tensor, Tensor, Tensor)

Every float of the bundles is one of `numbers`, unless it is None, as `given` says. While torch.compile traces, they are
`traced_numbers` instead, an fp64 tensor on the CPU: the value of a float would be compiled in, and a temperature that
changes with each step would cost a compilation per step. A body reads plain floats either way. It also gets tensors as
kernels need them: contiguous, apart from matrices whose rows are (columns of a wider one), which stay where they lie.

Not `torch.library.custom_op`, which does the same for flat arguments only: its first call imports torch._dynamo, which
takes a second and is of use only under torch.compile.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Function
from torch.distributed import ProcessGroup

from sgcd_kernels.core.lm_head import group_name, group_named
from sgcd_kernels.core.validation import PLAIN_TENSORS

NAMESPACE = "sgcd_kernels"
Number = float | Tensor
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]  # torch forgets what is dropped
P = ParamSpec("P")
R = TypeVar("R")
Backward = Callable[..., dict[str, Tensor | None]]


def register(
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Backward | None = None,
    *,
    differentiable: tuple[str, ...] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: an op sgcd_kernels::NAME from a function NAME_op, to be called with positional arguments.

    Arguments may be tensors, numbers, strings, process groups, and NamedTuples or dataclasses of these; results are
    tensors, None, and such bundles of them. No result may share memory with another or with an argument. For a float, a
    tensor of one element may be given: its value is read before the body runs.

    `fake(*arguments)` returns uninitialised results. `setup(ctx, result, *arguments)` and `backward(ctx, upstream)` are
    those of an autograd.Function: `upstream` has the structure of the result, and gradients are returned by the name of
    the flat argument, such as "hidden" or "head_weight"; arguments left out get none. A second derivative is refused.
    `differentiable` names the results that have a gradient (None is all). An op without `backward` must be called where
    no gradient is recorded. These three functions must not read numbers, which are 0-dimensional tensors while
    torch.compile traces.
    """

    def made(body: Callable[P, R]) -> Callable[P, R]:
        op = _Op(body, fake)
        if setup is not None and backward is not None:
            op.register_autograd(setup, backward, differentiable)

        @functools.wraps(body)
        def call(*values: P.args, **_: P.kwargs) -> R:
            result: R = op.joined(op.dispatched(*op.flat(values)))
            return result

        call.op = op  # type: ignore[attr-defined]
        return call

    return made


class _Op:
    """One op: the translation between the bundles of its functions and the flat values of the dispatcher."""

    def __init__(self, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
        hints = typing.get_type_hints(body)
        self.arguments = {name: _codec(hints[name]) for name in inspect.signature(body).parameters}
        self.result = _codec(hints["return"])
        self.body, self.fake = body, fake
        name = body.__name__.removesuffix("_op")
        self.qualified = f"{NAMESPACE}::{name}"
        tags = (torch.Tag.pt2_compliant_tag,)
        torch.library.define(self.qualified, self.schema(), lib=_LIBRARY, tags=tags)
        torch.library.impl(self.qualified, "CompositeExplicitAutograd", _untraced(self.run), lib=_LIBRARY)
        torch.library.register_fake(self.qualified, self.run_fake, lib=_LIBRARY)
        self.dispatched = getattr(getattr(torch.ops, NAMESPACE), name).default

    def flat_arguments(self) -> list[tuple[str, str]]:
        own = [flat for name, codec in self.arguments.items() for flat in codec.schema(name)]
        return [*own, ("given", "bool[]"), ("numbers", "float[]"), ("traced_numbers", "Tensor?")]

    def schema(self) -> str:
        arguments = ", ".join(f"{kind} {name}" for name, kind in self.flat_arguments())
        results = ", ".join(kind.rstrip("?") for _, kind in self.result.schema(""))
        return f"({arguments}) -> ({results})"

    def flat(self, values: tuple[Any, ...]) -> list[Any]:
        """The dispatcher's arguments."""
        flat: list[Any] = []
        numbers: list[Number | None] = []
        for codec, value in zip(self.arguments.values(), values, strict=True):
            codec.split(value, flat, numbers)
        return [*flat, *_packed(numbers)]

    def bundles(self, flat: Sequence[Any], read: Callable[[Tensor], Sequence[Any]]) -> list[Any]:
        """The arguments of the op's functions; `read` makes a sequence of `traced_numbers`."""
        *values, given, floats, traced = flat
        known = iter(floats if traced is None else read(traced))
        left, numbers = iter(values), (next(known) if there else None for there in given)
        return [codec.join(left, numbers) for codec in self.arguments.values()]

    def joined(self, output: Any) -> Any:
        return self.result.join(iter(_as_tuple(output)), iter(()))

    def results(self, value: Any, flat: Sequence[Any]) -> Any:
        """An op's results as tensors: an empty one of four dimensions stands for None."""
        results: list[Any] = []
        self.result.split(value, results, [])
        like = next(x for x in flat if isinstance(x, Tensor))
        out = tuple(like.new_empty((0,) * _NOTHING_DIM) if x is None else x for x in results)
        return out if len(out) > 1 else out[0]

    def run(self, *flat: Any) -> Any:
        flat = tuple(_as_kernels_read(x) if isinstance(x, Tensor) else x for x in flat)
        with _on_device_of(flat):
            return self.results(self.body(*self.bundles(flat, Tensor.tolist)), flat)

    def run_fake(self, *flat: Any) -> Any:
        _check_meta(self.qualified, flat)
        return self.results(self.fake(*self.bundles(flat, Tensor.unbind)), flat)

    def register_autograd(
        self, setup: Callable[..., None], backward: Backward, differentiable: tuple[str, ...] | None
    ) -> None:
        names = [name for name, _ in self.flat_arguments()]
        results = [name for name, _ in self.result.schema("")]

        def run_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            if differentiable is not None:
                found = zip(results, _as_tuple(output), strict=True)
                ctx.mark_non_differentiable(*(x for name, x in found if name not in differentiable))
            setup(ctx, self.joined(output), *self.bundles(inputs, Tensor.unbind))

        def run_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            if all(grad is None for grad in upstream):
                return tuple(None for _ in names)
            ctx.needs = dict(zip(names, ctx.needs_input_grad))  # torch appends an argument of its own
            with torch.no_grad():
                grads = backward(ctx, self.joined(upstream))
            assert grads.keys() <= set(names), grads.keys()
            if torch.is_grad_enabled():  # with create_graph
                grads = {name: _without_derivative(grad, self.qualified) for name, grad in grads.items()}
            return tuple(grads.get(name) if ctx.needs[name] else None for name in names)

        torch.library.register_autograd(self.qualified, run_backward, setup_context=run_setup, lib=_LIBRARY)


def _packed(numbers: list[Number | None]) -> tuple[list[bool], list[float], Tensor | None]:
    """(given, numbers, traced_numbers) of an op."""
    given, known = [x is not None for x in numbers], [x for x in numbers if x is not None]
    if torch.compiler.is_compiling() or any(isinstance(x, Tensor) and not _can_be_read(x) for x in known):
        return given, [], torch.stack([as_number_tensor(x) for x in known]) if known else None
    return given, [float(x.detach() if isinstance(x, Tensor) else x) for x in known], None


def _can_be_read(x: Tensor) -> bool:
    """False for tensors without a value: on meta, or while PyTorch traces."""
    return type(x) in PLAIN_TENSORS and not x.is_meta


def as_number_tensor(number: Number) -> Tensor:
    """A 0-dimensional fp64 tensor on the CPU, made so that torch.compile does not compile the value in.

    PyTorch turns a product with a float into one of tensors; the float of `torch.full` or `torch.tensor` is a constant.
    """
    if isinstance(number, Tensor):
        if number.is_meta:  # a number of results without values
            return torch.ones((), dtype=torch.float64, device="cpu")
        return number.detach().reshape(()).to("cpu", torch.float64)
    return torch.ones((), dtype=torch.float64, device="cpu") * number


class _WithoutDerivative(Function):
    """The identity, with a derivative that raises. `once_differentiable` lets a graph pass that adds to a gradient."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, op: str) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.op} has no second derivative: it is once_differentiable")


def _without_derivative(grad: Tensor | None, op: str) -> Tensor | None:
    if grad is None:
        return None
    result: Tensor = _WithoutDerivative.apply(grad.detach().requires_grad_(), op)  # type: ignore[no-untyped-call]
    return result


def save(ctx: Any, **values: Any) -> None:
    """Keep values and bundles for the backward pass, by name; tensors go through `save_for_backward`."""
    codecs: dict[str, _Codec] = {name: _codec(type(value)) for name, value in values.items()}  # type: ignore[arg-type]
    flat: list[Any] = []
    numbers: list[Any] = []
    for name, value in values.items():
        codecs[name].split(value, flat, numbers)
    # Tensors made in inference mode cannot be saved; copies of them can.
    ctx.save_for_backward(*(x.clone() if x.is_inference() else x for x in (*flat, *numbers) if isinstance(x, Tensor)))
    ctx.saved_by_name = codecs, *([None if isinstance(x, Tensor) else (x,) for x in part] for part in (flat, numbers))


def restore(ctx: Any) -> types.SimpleNamespace:
    """The values that `save` stored, by name."""
    codecs, *parts = ctx.saved_by_name
    tensors = iter(ctx.saved_tensors)
    flat, numbers = (iter([next(tensors) if x is None else x[0] for x in part]) for part in parts)
    return types.SimpleNamespace(**{name: codec.join(flat, numbers) for name, codec in codecs.items()})


class _Codec:
    """Converts an argument or result to flat values and numbers, and back. This one passes it on unchanged."""

    def __init__(self, kind: str = "") -> None:
        self.kind = kind

    def schema(self, name: str) -> list[tuple[str, str]]:
        """(flat name, type in the dispatcher's schema) of each flat value"""
        return [(name, self.kind)]

    def split(self, value: Any, flat: list[Any], numbers: list[Any]) -> None:
        flat.append(value)

    def join(self, flat: Iterator[Any], numbers: Iterator[Any]) -> Any:
        return next(flat)


class _OptionalTensor(_Codec):
    """A tensor or None. Results must be tensors: there an empty tensor of `_NOTHING_DIM` dimensions stands for None."""

    def join(self, flat: Iterator[Any], numbers: Iterator[Any]) -> Any:
        value = next(flat)
        return None if value is None or value.dim() == _NOTHING_DIM else value


class _Number(_Codec):
    """A float or None."""

    def schema(self, name: str) -> list[tuple[str, str]]:
        return []

    def split(self, value: Any, flat: list[Any], numbers: list[Any]) -> None:
        numbers.append(value)

    def join(self, flat: Iterator[Any], numbers: Iterator[Any]) -> Any:
        return next(numbers)


class _NumberOrTensor(_Number):
    """A number, or a tensor of more than one element, such as temperatures per token."""

    def schema(self, name: str) -> list[tuple[str, str]]:
        return [(name, "Tensor?")]

    def split(self, value: Any, flat: list[Any], numbers: list[Any]) -> None:
        several = isinstance(value, Tensor) and value.numel() != 1
        flat.append(value if several else None)
        numbers.append(None if several else value)

    def join(self, flat: Iterator[Any], numbers: Iterator[Any]) -> Any:
        tensor, number = next(flat), super().join(flat, numbers)
        return number if tensor is None else tensor


class _Integer(_Codec):
    """Also of NumPy. Symbolic integers stay what they are."""

    def split(self, value: Any, flat: list[Any], numbers: list[Any]) -> None:
        flat.append(value if value is None or isinstance(value, (int, torch.SymInt)) else int(value))


class _Group(_Codec):
    def split(self, value: Any, flat: list[Any], numbers: list[Any]) -> None:
        flat.append(group_name(value))

    def join(self, flat: Iterator[Any], numbers: Iterator[Any]) -> Any:
        return group_named(next(flat))


class _Names(_Codec):
    def split(self, value: Any, flat: list[Any], numbers: list[Any]) -> None:
        flat.append(",".join(value))

    def join(self, flat: Iterator[Any], numbers: Iterator[Any]) -> Any:
        return tuple(name for name in next(flat).split(",") if name)


class _Bundle(_Codec):
    """A NamedTuple or dataclass, as its fields."""

    def __init__(self, bundle: type) -> None:
        names = [field.name for field in fields(bundle)] if is_dataclass(bundle) else list(bundle._fields)  # type: ignore[attr-defined]
        hints = typing.get_type_hints(bundle)
        self.bundle, self.fields = bundle, [(name, _codec(hints[name])) for name in names]

    def schema(self, name: str) -> list[tuple[str, str]]:
        prefix = f"{name}_" if name else ""
        return [flat for field, codec in self.fields for flat in codec.schema(prefix + field)]

    def split(self, value: Any, flat: list[Any], numbers: list[Any]) -> None:
        for field, codec in self.fields:
            codec.split(getattr(value, field), flat, numbers)

    def join(self, flat: Iterator[Any], numbers: Iterator[Any]) -> Any:
        return self.bundle(*[codec.join(flat, numbers) for _, codec in self.fields])  # in the bundle's own order


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    bool: "bool",
    str: "str",
}


@functools.cache
def _codec(annotation: Any) -> _Codec:
    if annotation in (float, float | None):
        return _Number()
    if annotation in (int, int | None):
        return _Integer("SymInt" if annotation is int else "SymInt?")
    if annotation in _SCHEMA_TYPES:
        return _Codec(_SCHEMA_TYPES[annotation])
    if annotation == Tensor | None:
        return _OptionalTensor("Tensor?")
    if annotation in (float | Tensor, float | Tensor | None):
        return _NumberOrTensor()
    if annotation == ProcessGroup | None:
        return _Group("str")
    if annotation == tuple[str, ...]:
        return _Names("str")
    if typing.get_origin(annotation) is Literal:
        return _Codec("str")
    if is_dataclass(annotation) or hasattr(annotation, "_fields"):
        return _Bundle(annotation)
    return _Codec()


_NOTHING_DIM = 4  # no op has a result with so many dimensions


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _as_kernels_read(x: Tensor) -> Tensor:
    """Contiguous; a matrix with contiguous rows that do not overlap is returned as it is."""
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x
    return x.contiguous()


def _check_meta(op: str, flat: Sequence[Any]) -> None:
    """One tensor on meta sends a call here, where memory that nobody has written would be its result."""
    tensors = [x for x in flat if isinstance(x, Tensor)]
    if any(x.is_meta for x in tensors) and not tensors[0].is_meta:
        raise ValueError(f"{op} got a tensor on meta, needs all on {tensors[0].device} (or the first on meta too)")


def _on_device_of(flat: Sequence[Any]) -> Any:
    """Make the tensors' GPU the current one: Triton launches on the current device, wherever its arguments are."""
    device = next((x.device for x in flat if isinstance(x, Tensor) and x.is_cuda), None)
    return contextlib.nullcontext() if device is None else torch.cuda.device(device)


def _untraced(body: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile from tracing an op's body, which it tries after a graph break in the caller."""
    # `torch.compiler.disable` imports torch._dynamo when called, and sets an attribute: not possible on a bound method.
    disabled = _disable_dynamo(lambda *args: body(*args))

    @functools.wraps(body)
    def run(*args: Any) -> Any:
        return disabled(*args) if "torch._dynamo" in sys.modules else body(*args)

    return run
