"""Call the raw operators with arguments that hypothesis draws, many of them wrong: python fuzz.py CASES [SEED].

Prints, for each operator, how many calls worked and how many were refused. A process of its own, run by test_entry.py
and `make sanitize`, because what it looks for would take the test runner down with it.
"""

from __future__ import annotations

import collections
import sys
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from sgcd_kernels import backend_status

assert backend_status()["cpp"].usable
ops = torch.ops.sgcd_kernels
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64]
LAYOUTS = (
    "transposed",
    "one row expanded",
    "every other row",
    "huge and empty",
    "meta",
    "sparse",
    "one more",
    "one less",
)
NUMBERS = [0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-30, 1e30]
BROKEN_VALUES = [float("nan"), float("inf"), -float("inf"), 1e30]
INTEGERS = [-1, -100, 2**31 - 1, 2**31, -(2**63), 2**63 - 1]


class Draw:
    """Draws the arguments of a call; about every second call is valid."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.flaws = data.draw(st.sampled_from([0, 0, 1, 2, 4]))
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def of(self, *options: Any) -> Any:
        return self.data.draw(st.sampled_from(options))

    def flaw(self) -> bool:
        """Whether to do it wrong here; seldom, and no more often than the case allows."""
        if self.flaws == 0 or self.of(*range(8)) != 0:
            return False
        self.flaws -= 1
        return True

    def tensor(self, shape: list[int], dtype: torch.dtype, high: int = 2) -> torch.Tensor:
        """Numbers, of which one may be infinite, or integers in [0, high), of which one may be far outside."""
        if self.flaw():
            dtype = self.of(*DTYPES)
        layout = self.of(*LAYOUTS) if self.flaw() else None
        if layout in ("one more", "one less") and shape:
            at = self.of(*range(len(shape)))
            shape = [max(0, s + (1 if layout == "one more" else -1) * (i == at)) for i, s in enumerate(shape)]
        if dtype.is_floating_point or dtype.is_complex:
            x = torch.randn(shape, generator=self.generator) * self.of(1, 1, 30)
        else:
            x = torch.randint(max(1, high), shape, generator=self.generator)
        if x.numel() and self.of(*range(6)) == 0:
            x.view(-1)[self.of(0, x.numel() // 2, x.numel() - 1)] = self.of(
                *(BROKEN_VALUES if x.is_floating_point() else INTEGERS)
            )
        return laid_out(x.to(dtype), layout)

    def number(self, *usual: float) -> float:
        return self.of(*NUMBERS) if self.flaw() else self.of(*usual)

    def maybe(self, make: Any) -> Any:
        return make() if self.of(True, False) else None


def laid_out(x: torch.Tensor, layout: str | None) -> torch.Tensor:
    if layout == "transposed" and x.dim() == 2:
        return x.t().contiguous().t()
    if layout == "one row expanded" and x.dim() and x.shape[0]:
        return x[:1].expand(x.shape)
    if layout == "every other row" and x.dim():
        return x[::2]
    if layout == "huge and empty":
        return x.new_empty(1).expand([2**33] + [1] * max(0, x.dim() - 1))
    if layout == "meta":
        return x.to("meta")
    if layout == "sparse" and x.dim() and x.is_floating_point():
        return x.to_sparse()
    return x


class Call:
    """The arguments of one call, around one shape."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.n, self.h = draw.of(0, 1, 2, 63, 64, 65, 70, 260), draw.of(1, 2, 3, 8, 33)
        self.v = draw.of(1, 2, 63, 64, 65, 130)
        self.dtype = draw.of(*FLOATS)
        self.rows = draw.maybe(lambda: draw.tensor([draw.of(0, 1, 5, self.n)], torch.int64, self.n))
        rows_fit = self.rows is not None and self.rows.dim() == 1
        self.m = self.rows.shape[0] if rows_fit and self.rows.shape[0] < 2**20 else self.n

    def head(self) -> tuple[torch.Tensor | None, ...]:
        bias = self.draw.maybe(lambda: self.draw.tensor([self.v], torch.float32))
        return self.draw.tensor([self.n, self.h], self.dtype), self.draw.tensor([self.v, self.h], self.dtype), bias

    def each(self) -> torch.Tensor:
        return self.draw.tensor([self.m], torch.float32)

    def targets(self) -> torch.Tensor:
        return self.draw.tensor([self.m], torch.int64, self.v)

    def shared(self) -> tuple[torch.Tensor | None, float]:
        return self.draw.maybe(self.each), self.draw.number(0.0, 5.0)

    def needs(self) -> list[bool]:
        return [self.draw.of(True, False) for _ in range(2 if self.draw.flaw() else 3)]

    def entropies(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.draw.flaw():
            return self.each(), None
        return (self.each(), self.each()) if self.draw.of(True, False) else (None, None)

    def bounds(self) -> torch.Tensor:
        cuts = sorted(self.draw.of(*range(self.n + 1)) for _ in range(self.draw.of(0, 1, 3)))
        if self.draw.flaw():
            return self.draw.tensor([len(cuts) + 2], torch.int64, self.n + 1)
        return torch.tensor([0, *cuts, self.n])

    def packed(self, floats: int) -> tuple[torch.Tensor, ...]:
        dtype = self.draw.of(torch.float32, torch.float64)
        return tuple(self.draw.tensor([self.n], dtype) for _ in range(floats))

    def eligible(self) -> torch.Tensor:
        return self.draw.tensor([self.n], torch.bool)


def order_statistics(c: Call) -> tuple[Any, ...]:
    bounds = c.bounds()
    places = (c.draw.tensor([max(0, bounds.numel() - 1)], torch.int64, c.n) for _ in range(2))
    return (*c.packed(1), c.eligible(), bounds, *places)


def find_spans(c: Call) -> tuple[Any, ...]:
    turns = c.draw.maybe(lambda: c.draw.tensor([c.n], torch.int64, 3))
    limits = (
        c.draw.number(0.1),
        c.draw.number(0.02),
        c.draw.of(1, 16, 0, -1, 2**62),
        c.draw.number(1.5),
        c.draw.number(0.1),
    )
    return (*c.packed(2), turns, c.eligible(), c.bounds(), *limits)


def mixture_stats(c: Call) -> tuple[Any, ...]:
    normalisers = c.draw.tensor([4, c.m], torch.float32)
    wanted = c.draw.of(True, False), c.draw.of(True, False)
    return (*c.head(), *c.head(), c.rows, normalisers, *c.shared(), c.draw.number(0.5, 0.0, 1.0), *wanted)


def logprob_grads(c: Call) -> tuple[Any, ...]:
    head = *c.head(), c.rows, c.targets(), *c.shared()
    values, needs, cached = (c.each(), c.draw.maybe(c.each), c.each(), c.each(), *c.entropies()), c.needs(), []
    if c.draw.of(True, False):
        try:
            cached = list(ops.head_stats_cached(*head, needs[1] != c.draw.flaw())[1])
        except (ValueError, NotImplementedError, RuntimeError):
            cached = [c.each()] * 5
        if cached and c.draw.flaw():
            cached[c.draw.of(*range(len(cached)))] = c.draw.tensor([c.v, c.h], c.dtype)
        if c.draw.flaw():
            cached = cached[1:]
    return (*head, *values, needs, c.draw.of(True, False), cached)


def distill_grads(c: Call) -> tuple[Any, ...]:
    values, beta = [c.each() for _ in range(6)], c.draw.number(0.5, 0.0, 1.0)
    return (
        *c.head(),
        *c.head(),
        c.rows,
        *c.shared(),
        *values,
        beta,
        c.draw.of(3, -1) if c.draw.flaw() else c.draw.of(0, 1, 2),
        c.needs(),
    )


def pair_topk(c: Call) -> tuple[Any, ...]:
    k = c.draw.of(0, -1, 2**40, c.v + 1) if c.draw.flaw() else c.draw.of(*range(1, c.v + 1))
    return (*c.head(), *c.head(), c.rows, c.targets(), *c.shared(), k)


CALLS = {
    "matmul_sweep": lambda c: (*c.head()[:2], c.draw.maybe(lambda: c.draw.tensor([c.n, c.h], c.dtype))),
    "head_stats": lambda c: (*c.head(), c.rows, c.targets(), *c.shared()),
    "head_stats_cached": lambda c: (*c.head(), c.rows, c.targets(), *c.shared(), c.draw.of(True, False)),
    "pair_stats": lambda c: (*c.head(), *c.head(), c.rows, c.targets(), *c.shared()),
    "pair_topk": pair_topk,
    "mixture_stats": mixture_stats,
    "logprob_grads": logprob_grads,
    "distill_grads": distill_grads,
    "find_spans": find_spans,
    "order_statistics": order_statistics,
}
if not hasattr(ops, "matmul_sweep"):  # only in a build for the benchmark
    del CALLS["matmul_sweep"]
worked: collections.Counter[str] = collections.Counter()
refused: collections.Counter[str] = collections.Counter()


def one_case(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CALLS)))
    try:
        arguments = CALLS[name](Call(Draw(data)))
    except (RuntimeError, TypeError, NotImplementedError):
        return  # it asked torch for something that does not exist
    try:
        getattr(ops, name)(*arguments)
        worked[name] += 1
    except (ValueError, NotImplementedError, RuntimeError):
        refused[name] += 1


def main(cases: int, start: int) -> None:
    checks = list(HealthCheck)
    fuzz = settings(
        max_examples=cases, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=checks
    )
    seed(start)(fuzz(given(st.data())(one_case)))()
    for name in sorted(CALLS):
        print(name, worked[name], refused[name])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
