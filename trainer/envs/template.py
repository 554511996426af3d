"""What `init-env NAME` writes: `trainer.envs.example` under another name, and a config that trains on it."""

from __future__ import annotations

import importlib.util
import keyword
from pathlib import Path

from trainer.envs import SUITES
from trainer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """\
# Trains the tiny policy on {name}.py: python -m trainer.run train {name}.yaml. Other keys: {root}/trainer/config.py.
# The tiny policy knows the words and tools of `workday` alone. With tools of your own, take a model that reads their
# schemas: docs/models.md.
output_dir: runs/{name}
model: {{ path: {root}/trainer/assets/workday-tiny, renderer: compact, max_length: 512, cpu_threads: 1 }}
env: {{ name: "{name}:Suite", train_split: train, eval_split: dev, max_turns: 8 }}
writer: {{ name: contrast }}
groups_per_step: 8
max_resample_times: 1
max_completion_length: 32
learning_rate: 1.0e-4
max_steps: 10
eval_samples: 4
"""


def write(name: str, folder: Path | None = None) -> list[Path]:
    """Write NAME.py and NAME.yaml into `folder` (the working directory), and return their paths.

    Raises:
        UserError: the name is no module's, is taken, or a file is there already; then nothing is written.
    """
    folder = folder or Path.cwd()
    if not name.isidentifier() or keyword.iskeyword(name) or not name.isascii():
        raise UserError(f"init-env: {name!r} is no name of a module; needs letters, digits and _, such as my_env")
    files = {folder / f"{name}.py": environment(), folder / f"{name}.yaml": CONFIG.format(name=name, root=ROOT)}
    for path in files:
        if path.exists() or path.is_symlink():
            raise UserError(f"init-env: {path} is there already and is left as it is; choose another name")
    if name in SUITES or importlib.util.find_spec(name) is not None:
        raise UserError(f"init-env: {name} is a module or an environment already; choose another name")
    for path, text in files.items():
        with path.open("x", encoding="utf-8") as file:  # fails where one has come meanwhile
            file.write(text)
    return list(files)


def environment() -> str:
    """The text of the example."""
    return (Path(__file__).parent / "example.py").read_text(encoding="utf-8")
