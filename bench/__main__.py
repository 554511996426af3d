"""`python -m bench COMMAND`: measure, check, plot, and put the results into the documents.

A person's mistake is one line on stderr and exit code 2. `table` needs no torch, `plot` only matplotlib.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bench import rows
from bench.cases import METRICS
from bench.errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parser() -> Parser:
    main = Parser(prog="python -m bench", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, does in (("run", "measure, and write bench/results/*.csv"), ("verify", "only check the answers")):
        run = commands.add_parser(name, help=does, description=does)
        run.add_argument("--op", nargs="+", default=[])
        run.add_argument("--shape", nargs="+", default=[], help="a model's head; with --tokens, off the selection")
        run.add_argument("--tokens", nargs="+", type=int, default=[])
        run.add_argument("--provider", nargs="+", default=[])
        run.add_argument("--mode", nargs="+", default=[], help="forward, backward or full")
        run.add_argument("--dtype", nargs="+", default=[], help="fp32, bf16 or fp16")
        run.add_argument("--metric", nargs="+", default=list(METRICS), help="speed, memory, error")
        run.add_argument("--device", default="auto", help="auto, cpu or cuda")
        run.add_argument("--samples", type=int, default=5)
        run.add_argument("--threads", type=int, default=0, help="of a CPU; 0 leaves it to PyTorch")
        run.add_argument("--budget", type=float, default=0.0, help="seconds after which no case is begun; 0: none")
        run.add_argument("--with", dest="files", nargs="+", default=[], help="Python files that register providers")
        run.add_argument("--out", default=str(rows.RESULTS), help="folder of the CSVs")
        run.add_argument("--dry-run", action="store_true", help="say what would be measured")
    train = commands.add_parser("train", help="the trainer, and TRL's GRPOTrainer beside it")
    train.add_argument("--provider", nargs="+", default=[])
    train.add_argument("--steps", type=int, default=3)
    train.add_argument("--out", default=str(rows.RESULTS))
    plot = commands.add_parser("plot", help="pictures from the CSVs")
    plot.add_argument("--results", default=str(rows.RESULTS))
    plot.add_argument("--out", default="")
    table = commands.add_parser("table", help="the documents' tables from the CSVs")
    table.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    commands.add_parser("tune", help="the configs of the Triton kernels, and the time of each on a GPU")
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        args = parser().parse_args(arguments)
        return int(COMMANDS[args.command](args))
    except UserError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was measured is in the CSVs", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    from bench import machine, select, supervise
    from bench.job import Job

    select.check(args)
    on = select.device(args.device)
    found = select.cases(args, on)
    if on == "cpu" and not args.dtype and "bf16" not in machine.fast_dtypes(on):
        print("bf16 is left out: this processor has no instructions for it; --dtype bf16 measures it all the same")
    if args.dry_run:
        print("\n".join(str(case) for case in found))
        return 0
    verify = args.command == "verify"
    start = time.time()
    wrong = supervise.run(
        Job(
            found,
            args.provider,
            ["error"] if verify else args.metric,
            args.samples,
            args.threads,
            "" if verify else str(Path(args.out).resolve()),
            start + args.budget if args.budget else 0.0,
            args.budget,
            [str(Path(f).resolve()) for f in args.files],
        )
    )
    print(f"\n{len(found)} cases in {time.time() - start:.0f} s" + (f"; {wrong} of our own failed" if wrong else ""))
    return 1 if wrong else 0


def plot(args: argparse.Namespace) -> int:
    from bench import plots

    return plots.main(Path(args.results), Path(args.out) if args.out else None)


def table(args: argparse.Namespace) -> int:
    from bench import tables

    return tables.main(check=args.check)


def train(args: argparse.Namespace) -> int:
    from bench import training

    return training.main(args.provider, args.steps, Path(args.out))


def tune(args: argparse.Namespace) -> int:
    from bench import tuning

    return tuning.main()


COMMANDS = {"run": run, "verify": run, "plot": plot, "table": table, "train": train, "tune": tune}

if __name__ == "__main__":
    sys.exit(main())
