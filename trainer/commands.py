"""The commands train, eval, view, check, check-env and init-env.

A reported error is one line on stderr and exit code 2, and so is an error of the disk. SIGINT (Ctrl-C), SIGTERM and
SIGHUP are one line and 130, 143 and 129. A bug shows its traceback and gives 1. torch and transformers are imported
only after the arguments are parsed, so that a usage error is reported at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer import stop_signals
from trainer.errors import ReportedError, UserError, file_failed
from trainer.optional_packages import missing
from trainer.terminal import say

USAGE = """\
usage: python -m trainer.run COMMAND CONFIG [--key value ...]
       python -m trainer.run check-env my_module:Suite [--env.timeout 5 --env.options.key value ...]
       python -m trainer.run init-env NAME

  train  train, or resume from the newest checkpoint of the run
  eval   evaluate a run's newest checkpoint, one checkpoint, or the model of a config file, on env.eval_split
  view   write the page that shows a run: curves, siblings, every token coloured by its weight
  check  prove the installation and the config before hours are spent
  check-env  play an environment of your own (or the one of a config) and name what has to be mended
  init-env   write NAME.py, an environment to begin with, and NAME.yaml, a config that trains on it

CONFIG is a YAML file (see configs/) or the folder of a run. --key value changes any key of it, with a dot for keys in
a section: --max_steps 10 --credit.gamma 0.5 --output_dir runs/mine
"""

RESUMES = "the same command resumes from the newest checkpoint"
BEGINS_AGAIN = "nothing was changed; the same command begins again"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    resumes = given[:1] == ["train"]
    try:
        with stop_signals.StopSignals(RESUMES if resumes else BEGINS_AGAIN):
            return dispatch(given)
    except ReportedError as error:
        return _fail(error)
    except stop_signals.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except ModuleNotFoundError as error:
        try:
            return _fail(missing(error))
        except ModuleNotFoundError:
            traceback.print_exc()
            return 1
    except OSError as error:
        return _fail(file_failed(error))


def dispatch(arguments: list[str]) -> int:
    """Choose the command; a mistake in the arguments is a `UserError`."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}; there are {', '.join(COMMANDS)}")
    if not rest or rest[0].startswith("--"):
        what, example = NEEDS.get(command, ("a config file or a run's folder", "configs/workday_sgcd.yaml"))
        raise UserError(f"{command}: needs {what}, as in {command} {example}")
    return COMMANDS[command](Path(rest[0]), rest[1:])


def train(source: Path, overrides: Sequence[str]) -> int:
    from trainer.preflight import config_file

    config = config_file.load(source, overrides)
    with only_writer(config.output_dir):
        config_file.claim(config)
        from trainer import loop

        loop.train(config)
        from trainer.records import view_page

        say(f"view: {view_page.write(config.output_dir)}")
    return 0


def evaluate(source: Path, overrides: Sequence[str]) -> int:
    from trainer.preflight import config_file

    run_dir = source.absolute().parent.parent if is_checkpoint(source) else source
    config = config_file.load(run_dir, overrides)
    from trainer.evaluation import command as evaluation
    from trainer.records import checkpoint

    if source.is_file():
        weights = None
    elif run_dir is source:
        weights = checkpoint.latest(source, lambda line: say(f"WARNING: {line}", sys.stderr))
    else:
        weights = source
    if source.is_dir() and weights is None:
        raise UserError(f"{source}: holds no checkpoint; to evaluate the model it started from: eval CONFIG.yaml")
    evaluation.run(config, weights)
    return 0


def is_checkpoint(source: Path) -> bool:
    """Whether this is RUN/checkpoints/step_N."""
    return source.is_dir() and source.absolute().parent.name == "checkpoints" and source.name.startswith("step_")


def view(source: Path, overrides: Sequence[str]) -> int:
    from trainer.preflight import config_file

    # The run's folder is enough: a run is shown even if this version would refuse its config.
    run_dir = source if source.is_dir() and not overrides else config_file.load(source, overrides).output_dir
    from trainer.records import view_page

    say(f"view: {view_page.write(run_dir)}")
    return 0


def check(source: Path, overrides: Sequence[str]) -> int:
    from trainer.preflight import config_file

    config, mistakes = config_file.load_what_fits(source, overrides)
    from trainer.preflight import check as checks

    return 0 if checks.check(config, mistakes) else 2


def check_env(source: Path, overrides: Sequence[str]) -> int:
    from trainer.preflight import config_file

    if source.exists():
        config = config_file.load(source, overrides)
    else:
        config = config_file.build({"env": {"name": str(source)}}, overrides)
    from trainer.preflight import check_env as checks

    return 0 if checks.check_env(config.env) else 2


def init_env(name: Path, overrides: Sequence[str]) -> int:
    from trainer.envs import template

    if overrides:
        raise UserError(f"init-env: takes a name alone, got {' '.join(overrides)}")
    for path in template.write(str(name)):
        print(f"written: {path}")
    print(f"next: python -m trainer.run check-env {name}:Suite; python -m trainer.run train {name}.yaml")
    return 0


NEEDS = {  # what a command works on, where that is no config
    "check-env": ("an environment as module:Suite, or a config file", "my_module:Suite"),
    "init-env": ("a name", "my_env"),
}
COMMANDS: dict[str, Callable[[Path, Sequence[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "view": view,
    "check": check,
    "check-env": check_env,
    "init-env": init_env,
}


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; a second training in it would mix two runs into one record."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # never through a link
        lock = os.open(run_dir / ".lock", flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{run_dir / '.lock'} is a link, which the run would write through; remove it") from None
        raise UserError(f"output_dir: {run_dir} cannot be written ({error.strerror}); choose another one") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir}: another process is training there; wait, or choose another --output_dir"
            ) from None
        yield
    finally:
        os.close(lock)


def _fail(error: ReportedError) -> int:
    for line in error.lines:
        say(f"error: {line}", sys.stderr)
    return 2
