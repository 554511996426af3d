"""From the command line's words to cases."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bench import machine, registry
from bench.cases import DTYPES, HEADS, METRICS, MODES, OPS, Case, cpu_selection, gpu_selection
from bench.errors import UserError, check_names

TOKENS = [1024]  # where a head is named and a number of tokens is not


def device(name: str) -> str:
    """`auto` is the GPU if there is one."""
    import torch

    check_names("device", [name], ("auto", "cpu", "cuda"))
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; --device cpu, or a CUDA build of PyTorch")
    return name


def check(args: Namespace) -> None:
    """Refuse names that do not exist, and numbers that make no sense."""
    check_names("op", args.op, OPS)
    check_names("mode", args.mode, MODES)
    check_names("shape", args.shape, HEADS)
    check_names("dtype", args.dtype, DTYPES)
    check_names("metric", args.metric, METRICS)
    registry.load(tuple(Path(f) for f in args.files))
    check_names("provider", args.provider, registry.names())
    for n in args.tokens:
        if n < 1:
            raise UserError(f"--tokens: got {n}, needs at least 1")
    if args.samples < 1:
        raise UserError(f"--samples: got {args.samples}, needs at least 1")


def cases(args: Namespace, on: str) -> list[Case]:
    """The device's selection as far as it fits the words; with a head or tokens named, all combinations of them."""
    dtypes = tuple(args.dtype) or machine.fast_dtypes(on)
    selection = cpu_selection(dtypes) if on == "cpu" else gpu_selection()
    if args.shape or args.tokens:
        found = [
            Case(op, mode, shape, n, dtype, on)
            for op in args.op or OPS
            for mode in OPS[op].modes
            for shape in args.shape or ["smollm2"]
            for n in args.tokens or TOKENS
            for dtype in (dtypes if op != "credit" else ("fp32",))
        ]
    else:
        found = [c for c in selection if not args.op or c.op in args.op]
        if on == "cuda" and args.dtype:
            found = [Case(c.op, c.mode, c.shape, c.tokens, dtype, on) for c in found for dtype in dtypes]
        if args.mode or args.op:  # modes of an op that the selection leaves out
            found += [_in_mode(found, op, mode) for op, mode in _missing(found, args)]
    found = [c for c in found if not args.mode or c.mode in args.mode]
    if args.provider:
        found = [c for c in found if any(p.name in args.provider for p in registry.of(c.op))]
    if not found:
        modes = "; ".join(f"{op} has {', '.join(OPS[op].modes)}" for op in args.op or OPS)
        raise UserError(f"nothing to measure: no op of these has such a mode or provider ({modes})")
    return found


def _missing(found: list[Case], args: Namespace) -> list[tuple[str, str]]:
    present = {(c.op, c.mode) for c in found}
    ops = dict.fromkeys(c.op for c in found)
    return [(op, mode) for op in ops for mode in args.mode if mode in OPS[op].modes and (op, mode) not in present]


def _in_mode(found: list[Case], op: str, mode: str) -> Case:
    like = next(c for c in found if c.op == op)
    return Case(op, mode, like.shape, like.tokens, like.dtype, like.device)
