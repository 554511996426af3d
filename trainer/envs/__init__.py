"""Environments by name, by import path, or as entry points of the group `sgcd.envs`. Imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from sgcd_kernels.core.spelling import explain_choice
from trainer import plugins
from trainer.envs.contract import CheckedSuite
from trainer.errors import UserError
from trainer.protocols import Suite

SUITES = {
    "workday": "trainer.envs.workday",
    "bfcl": "trainer.envs.bfcl",
    "tau3_airline": "trainer.envs.tau3_airline",
    "appworld": "trainer.envs.appworld",
}


def load(name: str, **options: Any) -> Suite:
    """Return the suite called `name`, made with `options`; what it gives is checked at each call.

    A name of `SUITES` is a module with a function `suite(**options)`. Any other is `module:attribute`, or an entry
    point: a class, or a function that makes a suite.

    Raises:
        UserError: there is no such environment, it cannot be imported or made, or it is no `trainer.protocols.Suite`.
    """
    if name in SUITES:
        make = importlib.import_module(SUITES[name]).suite
    elif plugins.is_known(name, plugins.ENVS):
        make = plugins.find("env.name", name, plugins.ENVS)
    else:
        names = [*sorted(SUITES), *(point.name for point in plugins.installed(plugins.ENVS))]
        raise UserError(
            f"env.name: no environment is called {name!r}; there are {', '.join(names)}, and module:Suite"
            f"{explain_choice(name, names)}"
        )
    return CheckedSuite(name, plugins.build("env.name", name, make, options))


def check_split(suite: Suite, key: str, split: str) -> None:
    """Refuse a split that the suite does not have, or that is empty."""
    if not suite.splits.get(split):
        raise UserError(f"env.{key}: {suite.name} has no tasks in {split!r}; its splits are {', '.join(suite.splits)}")
