"""Finds and loads the compiled operators, or gives the reason why it cannot.

`setup.py` writes build.json beside the extension: which torch and which sources it was compiled from, or why it was not
compiled. The extension calls torch's C++ interface, which changes between releases, so it is loaded only by the release
that it was built for; in a checkout, only if `csrc/` has not changed since.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from sgcd_kernels.backends.cpp.sources import digest

FOLDER = Path(__file__).resolve().parent
NOTE = FOLDER / "build.json"
SOURCES = FOLDER.parents[2] / "csrc"  # exists only in a checkout
REBUILD = "`pip install --no-build-isolation .` from the sources, in an environment with torch and a C++ compiler"
EDITABLE = "pip install --no-build-isolation --no-deps -e ."


@functools.cache
def unavailable_reason() -> str | None:
    """Load the extension once. None if that worked, else the reason why not."""
    note = _note()
    libraries = sorted(FOLDER.glob("_C*.so"))
    if not libraries or "reason" in note:
        return f"the C++ extension was not built: {note.get('reason', 'setup.py has not run')}; {REBUILD} builds it"
    built_for = note.get("torch", "an unknown version")
    if built_for != torch.__version__:
        return (
            f"the C++ extension was built for torch {built_for} and this is {torch.__version__}; {REBUILD} rebuilds it"
        )
    if SOURCES.is_dir() and note.get("sources") != digest(SOURCES):
        return f"csrc/ changed since the C++ extension was built; `{EDITABLE}` rebuilds it"
    try:
        torch.ops.load_library(libraries[0])  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the C++ extension does not load: {error}"
    return None


def _note() -> dict[str, str]:
    try:
        note: dict[str, str] = json.loads(NOTE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note


def description() -> str:
    """The instruction set that the loaded extension uses on this machine."""
    return f"usable, {torch.ops.sgcd_kernels.cpu_isa()} path"
