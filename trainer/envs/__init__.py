"""Environments by name. Each is imported only when it is asked for."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from trainer.errors import UserError
from trainer.protocols import Suite

SUITES = {
    "workday": "trainer.envs.workday",
    "bfcl": "trainer.envs.bfcl",
    "tau3_airline": "trainer.envs.tau3_airline",
    "appworld": "trainer.envs.appworld",
}


def load(name: str, **options: Any) -> Suite:
    """Return the suite called `name`; its module offers `suite(**options)`.

    Raises:
        UserError: no environment has that name, or it does not take an option.
    """
    if name not in SUITES:
        raise UserError(f"env.name: no environment is called {name!r}; there are {', '.join(sorted(SUITES))}")
    make = importlib.import_module(SUITES[name]).suite
    takes = inspect.signature(make).parameters
    for option in options:
        if option not in takes:
            known = f"there are {', '.join(takes)}" if takes else "it takes none"
            raise UserError(f"env.options: {name} has no option {option!r}; {known}")
    suite: Suite = make(**options)
    return suite


def check_split(suite: Suite, key: str, split: str) -> None:
    """Refuse a split that the suite does not have, or that is empty."""
    if not suite.splits.get(split):
        raise UserError(f"env.{key}: {suite.name} has no tasks in {split!r}; its splits are {', '.join(suite.splits)}")
