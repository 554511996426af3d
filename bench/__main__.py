"""`python -m bench COMMAND`: measure, check, plot, and write the results into the documents.

A usage error is one line on stderr and exit code 2. `table` needs no torch, `plot` and `figure` only matplotlib.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from bench import results
from bench.cases import (
    DTYPES,
    HEADS,
    METRICS,
    MODES,
    OPS,
    Case,
    UserError,
    check_names,
    cpu_selection,
    gpu_selection,
    modes_of,
)

TOKENS = [1024]  # for --shape without --tokens


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parser() -> Parser:
    main = Parser(prog="python -m bench", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, does in (("run", "measure, and write bench/results/*.csv"), ("verify", "only check the answers")):
        run = commands.add_parser(name, help=does, description=does)
        run.add_argument("--op", nargs="+", default=[])
        run.add_argument("--shape", nargs="+", default=[], help="a model's head; like --tokens, replaces the selection")
        run.add_argument("--tokens", nargs="+", type=int, default=[])
        run.add_argument("--provider", nargs="+", default=[])
        run.add_argument("--mode", nargs="+", default=[], help="forward, backward or full")
        run.add_argument("--dtype", nargs="+", default=[], help="fp32, bf16 or fp16")
        run.add_argument("--metric", nargs="+", default=list(METRICS), help="speed, memory, error")
        run.add_argument("--device", default="auto", help="auto, cpu or cuda")
        run.add_argument("--samples", type=int, default=5)
        run.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's default")
        run.add_argument("--budget", type=float, default=0.0, help="seconds after which no case is started; 0: none")
        run.add_argument("--with", dest="files", nargs="+", default=[], help="Python files that register providers")
        run.add_argument("--out", default=str(results.RESULTS), help="folder for the CSVs")
        run.add_argument("--dry-run", action="store_true", help="list what would be measured")
    train = commands.add_parser("train", help="measure the trainer, and TRL's GRPOTrainer for comparison")
    train.add_argument("--provider", nargs="+", default=[])
    train.add_argument("--steps", type=int, default=3)
    train.add_argument("--out", default=str(results.RESULTS))
    plot = commands.add_parser("plot", help="plot all rows of the newest CPU and GPU")
    plot.add_argument("--results", default=str(results.RESULTS))
    plot.add_argument("--out", default="", help="folder; by default `plots` beside the CSVs")
    figure = commands.add_parser("figure", help="the front page's figure: memory and time over tokens")
    figure.add_argument("--results", default=str(results.RESULTS))
    figure.add_argument("--out", default=str(results.ROOT / "docs" / "figures" / "memory_time.png"))
    table = commands.add_parser("table", help="write the documents' tables from the CSVs")
    table.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    commands.add_parser("tune", help="time each config of the Triton kernels on a GPU")
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        args = parser().parse_args(arguments)
        return int(COMMANDS[args.command](args))
    except UserError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished cases are in the CSVs", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    from bench import suite

    check(args)
    device = choose_device(args.device)
    cases = choose_cases(args, device)
    if device == "cpu" and not args.dtype and "bf16" not in results.fast_dtypes(device):
        print("bf16 is left out: this processor has no instructions for it; --dtype bf16 measures it anyway")
    if args.dry_run:
        print("\n".join(str(case) for case in cases))
        return 0
    verify = args.command == "verify"
    start = time.time()
    wrong = suite.run_job(
        suite.Job(
            cases=cases,
            providers=args.provider,
            metrics=["error"] if verify else args.metric,
            samples=args.samples,
            threads=args.threads,
            folder="" if verify else str(Path(args.out).resolve()),
            deadline=start + args.budget if args.budget else 0.0,
            budget=args.budget,
            files=[str(Path(f).resolve()) for f in args.files],
        )
    )
    print(f"\n{len(cases)} cases in {time.time() - start:.0f} s" + (f"; {wrong} of ours failed" if wrong else ""))
    return 1 if wrong else 0


def check(args: argparse.Namespace) -> None:
    """Refuse unknown names and invalid numbers."""
    from bench import providers

    check_names("op", args.op, OPS)
    check_names("mode", args.mode, MODES)
    check_names("shape", args.shape, HEADS)
    check_names("dtype", args.dtype, DTYPES)
    check_names("metric", args.metric, METRICS)
    providers.load(tuple(Path(f) for f in args.files))
    check_names("provider", args.provider, providers.names())
    for n in args.tokens:
        if n < 1:
            raise UserError(f"--tokens: got {n}, needs at least 1")
    if args.samples < 1:
        raise UserError(f"--samples: got {args.samples}, needs at least 1")


def choose_device(name: str) -> str:
    """Resolve `auto`: the GPU if there is one, else the CPU."""
    import torch

    check_names("device", [name], ("auto", "cpu", "cuda"))
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; --device cpu, or a CUDA build of PyTorch")
    return name


def choose_cases(args: argparse.Namespace, device: str) -> list[Case]:
    """The device's selection, filtered by the options; with --shape or --tokens, all combinations instead."""
    from bench import providers

    dtypes = tuple(args.dtype) or results.fast_dtypes(device)
    if args.shape or args.tokens:
        cases = [
            Case(op, mode, shape, n, dtype, device)
            for op in args.op or OPS
            for mode in modes_of(op)
            for shape in args.shape or ["smollm2"]
            for n in args.tokens or TOKENS
            for dtype in (dtypes if op != "credit" else ("fp32",))
        ]
    else:
        selection = cpu_selection(dtypes) if device == "cpu" else gpu_selection()
        cases = [c for c in selection if not args.op or c.op in args.op]
        if device == "cuda" and args.dtype:
            cases = [replace(c, dtype=dtype) for c in cases for dtype in dtypes]
        cases += _modes_left_out(cases, args.mode)
    cases = [c for c in cases if not args.mode or c.mode in args.mode]
    if args.provider:
        cases = [c for c in cases if any(p.name in args.provider for p in providers.providers_of(c.op))]
    if not cases:
        modes = "; ".join(f"{op} has {', '.join(modes_of(op))}" for op in args.op or OPS)
        raise UserError(f"nothing to measure: none of these ops has such a mode or provider ({modes})")
    return cases


def _modes_left_out(cases: list[Case], modes: Sequence[str]) -> list[Case]:
    """Each op's first case, in the requested modes that the selection lacks."""
    present = {(c.op, c.mode) for c in cases}
    first = {c.op: c for c in reversed(cases)}
    return [
        replace(first[op], mode=mode)
        for op in dict.fromkeys(c.op for c in cases)
        for mode in modes
        if mode in modes_of(op) and (op, mode) not in present
    ]


def plot(args: argparse.Namespace) -> int:
    from bench import figures

    return figures.plot_all(Path(args.results), Path(args.out) if args.out else None)


def figure(args: argparse.Namespace) -> int:
    from bench import figures

    return figures.draw_front_page(Path(args.results), Path(args.out))


def table(args: argparse.Namespace) -> int:
    from bench import report

    return report.write_tables(check=args.check)


def train(args: argparse.Namespace) -> int:
    from bench import training

    return training.measure_trainers(args.provider, args.steps, Path(args.out))


def tune(args: argparse.Namespace) -> int:
    from bench import tuning

    return tuning.main()


COMMANDS = {
    "run": run,
    "verify": run,
    "train": train,
    "plot": plot,
    "figure": figure,
    "table": table,
    "tune": tune,
}

if __name__ == "__main__":
    sys.exit(main())
