"""Registers a function on bundles (`LMHead`, `PolicyLossConfig`, ...) as an op of torch.library.

The dispatcher takes flat lists of tensors and plain values. `register` derives them from the annotations of the body:
each bundle is flattened into its fields, named `<argument>_<field>`, and rebuilt for the body, its fake kernel and its
backward pass, so that none of them counts positions. For example

    logprob_op(hidden: Tensor, head: LMHead, targets: Tensor, ignore_index: int, impl: str) -> LogprobStats

is registered as

    logprob(Tensor hidden, Tensor head_weight, Tensor? head_bias, float? head_softcap, Tensor? head_temperature,
            float? head_temperature_number, str head_group, Tensor targets, SymInt ignore_index, str impl)
        -> (Tensor, Tensor, Tensor)

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
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from sgcd_kernels.core.lm_head import group_name, group_named

NAMESPACE = "sgcd_kernels"
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
    tensors, None, and such bundles of them. No result may share memory with another or with an argument.

    `fake(*arguments)` returns uninitialised results. `setup(ctx, result, *arguments)` and `backward(ctx, upstream)` are
    those of an autograd.Function: `upstream` has the structure of the result, and gradients are returned by the name of
    the flat argument, such as "hidden" or "head_weight"; arguments left out get none. `differentiable` names the
    results that have a gradient (None is all). An op without `backward` must be called where no gradient is recorded.
    """

    def made(body: Callable[P, R]) -> Callable[P, R]:
        op = _Op(body, fake)
        if setup is not None and backward is not None:
            op.register_autograd(setup, backward, differentiable)

        @functools.wraps(body)
        def call(*values: P.args, **_: P.kwargs) -> R:
            result: R = op.call(values)
            return result

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
        return [flat for name, codec in self.arguments.items() for flat in codec.schema(name)]

    def schema(self) -> str:
        arguments = ", ".join(f"{kind} {name}" for name, kind in self.flat_arguments())
        results = ", ".join(kind.rstrip("?") for _, kind in self.result.schema(""))
        return f"({arguments}) -> ({results})"

    def call(self, values: tuple[Any, ...]) -> Any:
        flat: list[Any] = []
        for codec, value in zip(self.arguments.values(), values, strict=True):
            flat += codec.split(value)
        return self.joined(self.dispatched(*flat))

    def bundles(self, flat: Sequence[Any]) -> list[Any]:
        values = iter(flat)
        return [codec.join(values) for codec in self.arguments.values()]

    def joined(self, output: Any) -> Any:
        return self.result.join(iter(_as_tuple(output)))

    def run(self, *flat: Any) -> Any:
        with _on_device_of(flat):
            return _as_results(self.result.split(self.body(*self.bundles(flat))), flat)

    def run_fake(self, *flat: Any) -> Any:
        return _as_results(self.result.split(self.fake(*self.bundles(flat))), flat)

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
            setup(ctx, self.joined(output), *self.bundles(inputs))

        @once_differentiable
        def run_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            if all(grad is None for grad in upstream):
                return tuple(None for _ in names)
            ctx.needs = dict(zip(names, ctx.needs_input_grad))  # torch appends an argument of its own
            grads = backward(ctx, self.result.join(iter(upstream)))
            assert grads.keys() <= set(names), grads.keys()
            return tuple(grads.get(name) if ctx.needs[name] else None for name in names)

        torch.library.register_autograd(self.qualified, run_backward, setup_context=run_setup, lib=_LIBRARY)


def save(ctx: Any, **values: Any) -> None:
    """Keep values and bundles for the backward pass, by name; tensors go through `save_for_backward`."""
    codecs: dict[str, _Codec] = {name: _codec(type(value)) for name, value in values.items()}  # type: ignore[arg-type]
    flat = [x for name, value in values.items() for x in codecs[name].split(value)]
    # Tensors made in inference mode cannot be saved; copies of them can.
    tensors = [x.clone() if x.is_inference() else x for x in flat if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.saved_by_name = codecs, [None if isinstance(x, Tensor) else (x,) for x in flat]


def restore(ctx: Any) -> types.SimpleNamespace:
    """The values that `save` stored, by name."""
    codecs, plain = ctx.saved_by_name
    tensors = iter(ctx.saved_tensors)
    flat = iter([next(tensors) if x is None else x[0] for x in plain])
    return types.SimpleNamespace(**{name: codec.join(flat) for name, codec in codecs.items()})


class _Codec:
    """Converts an argument or result to flat values of the dispatcher and back. This one passes it on unchanged."""

    def __init__(self, kind: str = "") -> None:
        self.kind = kind

    def schema(self, name: str) -> list[tuple[str, str]]:
        """(flat name, type in the dispatcher's schema) of each flat value"""
        return [(name, self.kind)]

    def split(self, value: Any) -> list[Any]:
        return [value]

    def join(self, flat: Iterator[Any]) -> Any:
        return next(flat)


class _OptionalTensor(_Codec):
    """A tensor or None. Results must be tensors: there an empty tensor of `_NOTHING_DIM` dimensions stands for None."""

    def join(self, flat: Iterator[Any]) -> Any:
        value = next(flat)
        return None if value is None or value.dim() == _NOTHING_DIM else value


class _NumberOrTensor(_Codec):
    """A number or a tensor, such as a temperature."""

    def schema(self, name: str) -> list[tuple[str, str]]:
        return [(name, "Tensor?"), (f"{name}_number", "float?")]

    def split(self, value: Any) -> list[Any]:
        return [value, None] if isinstance(value, Tensor) else [None, None if value is None else float(value)]

    def join(self, flat: Iterator[Any]) -> Any:
        tensor, number = next(flat), next(flat)
        return number if tensor is None else tensor


class _Float(_Codec):
    def split(self, value: Any) -> list[Any]:
        return [None if value is None else float(value)]


class _Group(_Codec):
    def split(self, value: Any) -> list[Any]:
        return [group_name(value)]

    def join(self, flat: Iterator[Any]) -> Any:
        return group_named(next(flat))


class _Names(_Codec):
    def split(self, value: Any) -> list[Any]:
        return [",".join(value)]

    def join(self, flat: Iterator[Any]) -> Any:
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

    def split(self, value: Any) -> list[Any]:
        return [x for field, codec in self.fields for x in codec.split(getattr(value, field))]

    def join(self, flat: Iterator[Any]) -> Any:
        return self.bundle(*[codec.join(flat) for _, codec in self.fields])  # in the bundle's own order


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    int: "SymInt",
    int | None: "SymInt?",
    bool: "bool",
    str: "str",
}


@functools.cache
def _codec(annotation: Any) -> _Codec:
    if annotation in (float, float | None):
        return _Float("float" if annotation is float else "float?")
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


def _as_results(flat: list[Any], inputs: Sequence[Any]) -> Any:
    """An op's results as tensors: an empty one of four dimensions stands for None."""
    like = next(x for x in inputs if isinstance(x, Tensor))
    out = tuple(like.new_empty((0,) * _NOTHING_DIM) if x is None else x for x in flat)
    return out if len(out) > 1 else out[0]


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


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
