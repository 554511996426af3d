"""The supported verl releases. Its plug-in points move between minor releases, so each one is tested first."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ("0.9.0", "0.9.1")


def check_version() -> None:
    """Refuse a verl release that these plug-ins were not tested with.

    Raises ImportError, naming the supported releases.
    """
    try:
        found = version("verl")
    except PackageNotFoundError:
        found = "not installed"
    if found not in SUPPORTED:
        raise ImportError(f"verl is {found}, needs {' or '.join(SUPPORTED)}: pip install verl=={SUPPORTED[-1]}")
