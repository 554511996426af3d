"""The benchmark's data folder: what it lists, and the parts of it that an episode is given.

Ground truth is read here for two things only: the task's class, and the literals that sanitiser and credit must mask.
Neither it nor a path to it is in a `Task`, in a prompt, or in the folder that a world plays in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.data import Task, TaskClass
from trainer.errors import UserError

PYTHON = Path(".venv-appworld/bin/python")
SPLITS = ("train", "dev", "test_normal", "test_challenge")
SHARED = ("base_dbs", "api_docs")  # what every task starts from
DOWNLOAD = (
    "run: .venv-appworld/bin/appworld download data --root ~/appworld && export APPWORLD_ROOT=~/appworld "
    "(or set it to the folder where data/ is)"
)
MAKE = "run: make appworld"


def check_package(python: Path) -> None:
    """Refuse an interpreter that is not there, lacks the package, or has it still packed as the index ships it."""
    if not python.is_file():
        raise UserError(f"env.name: appworld needs a Python of its own, and {python} is not there; {MAKE}")
    found = list(python.parent.parent.glob("lib/python3*/site-packages/appworld"))
    if not found:
        raise UserError(f"env.name: the package appworld is not installed beside {python}; {MAKE}")
    if not (found[0] / "apps" / "supervisor").is_dir():
        raise UserError(f"env.name: appworld's apps are still packed; run: {python.parent / 'appworld'} install")


def check_root(root: str | None) -> Path:
    """The data root, or what to do about it."""
    if not root:
        raise UserError(f"env.name: appworld needs its data and APPWORLD_ROOT is not set; {DOWNLOAD}")
    path = Path(root).absolute()
    if lacking := [n for n in ("datasets", "tasks", *SHARED) if not (path / "data" / n).is_dir()]:
        raise UserError(f"env.name: appworld's data root {path} has no data/{lacking[0]}; {DOWNLOAD}")
    return path


def task_ids(root: Path, split: str) -> list[str]:
    """The ids of a split in the benchmark's order; [] where its list is not there."""
    path = root / "data" / "datasets" / f"{split}.txt"
    lines = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return [line.partition(":")[0] for line in lines]  # a tag may follow the id


def task(root: Path, split: str, name: str) -> Task:
    specs = _json(root / "data" / "tasks" / name / "specs.json")
    supervisor = specs.get("supervisor") or specs["main_user"]
    return Task(
        id=name,
        env="appworld",
        split=split,
        scenario=name.rpartition("_")[0],
        task_class=_class(root, name),
        instruction=specs["instruction"],
        data={"supervisor": {k: supervisor[k] for k in ("first_name", "last_name", "email", "phone_number")}},
    )


def _class(root: Path, name: str) -> TaskClass:
    """A task that asks for an answer is about information; the benchmark has none that asks for nothing."""
    return "state_changing" if _answer(root, name) is None else "information"


def literals(root: Path, task: Task) -> list[str]:
    """The answer, and what the evaluator knows that the instruction does not say."""
    answer = [str(leaf) for leaf in _leaves(_answer(root, task.id)) if not isinstance(leaf, bool)]
    private = [str(leaf) for leaf in _leaves(_json(ground_truth(root, task.id) / "private_data.json"))]
    instruction = task.instruction.lower()
    hidden = [text for text in private if len(text) >= 3 and text.lower() not in instruction]
    return sorted({text for text in (*answer, *hidden) if text.lower() not in ("none", "true", "false")})


def ground_truth(root: Path, name: str) -> Path:
    return root / "data" / "tasks" / name / "ground_truth"


def copy_shared(root: Path, folder: Path) -> None:
    """Copied, not linked: a link would tell a world where the ground truth is."""
    for name in SHARED:
        shutil.copytree(root / "data" / name, folder / name)


def lay_out(root: Path, name: str, shared: Path, place: Path) -> None:
    """Make `place` a data root with one task, without its ground truth."""
    mine = place / "data" / "tasks" / name
    mine.mkdir(parents=True)
    for part in SHARED:
        (place / "data" / part).symlink_to(shared / part)
    shutil.copy(root / "data" / "tasks" / name / "specs.json", mine)
    shutil.copytree(root / "data" / "tasks" / name / "dbs", mine / "dbs")


def reveal(root: Path, name: str, place: Path) -> None:
    """Put the ground truth into `place`, for the evaluator's process to read."""
    (place / "data" / "tasks" / name / "ground_truth").symlink_to(ground_truth(root, name))


def _answer(root: Path, name: str) -> Any:
    return _json(ground_truth(root, name) / "answer.json")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"env.name: damaged appworld data: {path} ({type(error).__name__}); {DOWNLOAD}") from None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for child in value.values():
            yield from _leaves(child)
    elif isinstance(value, list):
        for child in value:
            yield from _leaves(child)
    elif value is not None:
        yield value
