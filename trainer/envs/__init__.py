"""Environments by name. Each is imported only when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from trainer.types import Suite, UserError

SUITES = {"workday": "trainer.envs.workday", "bfcl": "trainer.envs.bfcl"}


def load(name: str, **options: Any) -> Suite:
    """Return the suite called `name`; its module offers `suite(**options)`.

    Raises:
        UserError: no environment has that name.
    """
    if name not in SUITES:
        raise UserError(f"env.name: no environment is called {name!r}; there are {', '.join(sorted(SUITES))}")
    suite: Suite = importlib.import_module(SUITES[name]).suite(**options)
    return suite
