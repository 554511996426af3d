"""The commands: `python -m trainer.run train|eval|view|check CONFIG [--key value ...]` (or `python trainer/run.py`).

A person's mistake is one line on stderr and exit code 2; Ctrl-C is one line and 130; a traceback is a bug of ours.
torch and transformers are imported only when the arguments have been read, so that a slip is answered at once.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

if not __package__:  # run as a file: its folder must leave the path, or our types.py would hide Python's
    here = dirname(abspath(__file__))  # noqa: PTH100, PTH120 - pathlib itself imports Python's types
    sys.path[:] = [dirname(here), *(p for p in sys.path if abspath(p) != here)]  # noqa: PTH100, PTH120

import fcntl
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.extras import missing
from trainer.types import UserError

USAGE = """\
usage: python -m trainer.run COMMAND CONFIG [--key value ...]

  train  train, or go on from the newest checkpoint of the run
  eval   evaluate a run's newest checkpoint, one checkpoint, or the model of a config file, on env.eval_split
  view   write the page that shows a run: curves, siblings, every token coloured by its weight
  check  prove the installation and the config before hours are spent

CONFIG is a YAML file (see configs/) or the folder of a run. --key value changes any key of it, with a dot for keys in
a section: --max_steps 10 --credit.gamma 0.5 --output_dir runs/mine
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; give the exit code."""
    try:
        return dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        return _fail(error)
    except ModuleNotFoundError as error:
        try:
            return _fail(missing(error))
        except ModuleNotFoundError:
            traceback.print_exc()
            return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130


def dispatch(arguments: list[str]) -> int:
    """Choose the command; whatever is wrong with the arguments is a `UserError`."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}; there are {', '.join(COMMANDS)}")
    if not rest or rest[0].startswith("--"):
        raise UserError(f"{command}: needs a config file or a run's folder, as in {command} configs/workday_sgcd.yaml")
    return COMMANDS[command](Path(rest[0]), rest[1:])


def train(source: Path, overrides: Sequence[str]) -> int:
    from trainer import configfile

    config = configfile.load(source, overrides)
    with only_writer(config.output_dir):
        configfile.claim(config)
        from trainer import loop

        loop.train(config)
        from trainer import view as viewer

        print(f"view: {viewer.write(config.output_dir)}")
    return 0


def evaluate(source: Path, overrides: Sequence[str]) -> int:
    from trainer import configfile

    run_dir = source.absolute().parent.parent if is_checkpoint(source) else source
    config = configfile.load(run_dir, overrides)
    from trainer import checkpoint
    from trainer import evaluate as evaluation

    weights = None if source.is_file() else checkpoint.latest(source) if run_dir is source else source
    if source.is_dir() and weights is None:
        raise UserError(f"{source}: holds no checkpoint; to evaluate the model it started from: eval CONFIG.yaml")
    evaluation.run(config, weights)
    return 0


def is_checkpoint(source: Path) -> bool:
    """Whether this is RUN/checkpoints/step_N."""
    return source.is_dir() and source.absolute().parent.name == "checkpoints" and source.name.startswith("step_")


def view(source: Path, overrides: Sequence[str]) -> int:
    from trainer import configfile

    # A run's folder is enough to show it, whatever this version thinks of its config.
    run_dir = source if source.is_dir() and not overrides else configfile.load(source, overrides).output_dir
    from trainer import view as viewer

    print(f"view: {viewer.write(run_dir)}")
    return 0


def check(source: Path, overrides: Sequence[str]) -> int:
    from trainer import configfile

    config, mistakes = configfile.load_what_fits(source, overrides)
    from trainer import check as checks

    return 0 if checks.check(config, mistakes) else 2


COMMANDS: dict[str, Callable[[Path, Sequence[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "view": view,
    "check": check,
}


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; a second training in it would mix two runs into one record."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"output_dir: {run_dir} cannot be written ({error.strerror}); choose another one") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir}: another process is training there; wait, or choose another --output_dir"
            ) from None
        yield


def _fail(error: UserError) -> int:
    for line in error.lines:
        print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
