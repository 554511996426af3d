"""What a person did wrong, in one line."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Shown as one line on stderr; exit code 2."""


def check_names(what: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Refuse a name that is not among `valid`."""
    valid = list(valid)
    for name in given:
        if name not in valid:
            raise UserError(f"unknown {what} {name!r}; there are {', '.join(valid)}")
