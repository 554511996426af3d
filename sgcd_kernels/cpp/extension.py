"""Finding and loading the compiled operators, and saying why when that cannot be.

`setup.py` leaves a note beside the extension: which torch and which sources it was compiled from, or why it was not
compiled. The extension calls torch's C++ interface, which changes between releases, so it is loaded only into the
release it knows; in a checkout, only while `csrc/` is what it was built from.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from sgcd_kernels.cpp.sources import digest
from sgcd_kernels.types import Projection

FOLDER = Path(__file__).resolve().parent
NOTE = FOLDER / "build.json"
SOURCES = FOLDER.parents[1] / "csrc"  # there only in a checkout
REBUILD = "`pip install --no-build-isolation .` from the sources, in an environment with torch and a C++ compiler"
EDITABLE = "pip install --no-build-isolation --no-deps -e ."
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def unavailable_reason() -> str | None:
    """Load the extension once; why that is not possible here, or None."""
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
    """Which instructions the loaded extension uses on this machine."""
    return f"usable, {torch.ops.sgcd_kernels.cpu_isa()} path"


def refuses(op: str, p: Projection) -> str | None:
    """Why these inputs are for another backend, or None."""
    if p.hidden.device.type != "cpu":
        return f"it runs on CPU tensors and hidden is on {p.hidden.device}"
    for name, x in (("hidden", p.hidden), ("weight", p.weight)):
        if x.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16 and {name} is {x.dtype}"
    if p.weight.shape[1] and p.weight.shape[0] > 1 and not _row_major(p.weight):
        return f"it reads rows of weight as they lie and its strides are {p.weight.stride()}"
    if not 0 < p.weight.shape[1] < 1 << 20 or p.weight.shape[0] >= (1 << 31) - 65:
        return f"weight has shape {list(p.weight.shape)}, which is beyond what it indexes"
    return None


def _row_major(x: torch.Tensor) -> bool:
    return x.stride(0) >= x.shape[1] and (x.stride(1) == 1 or x.shape[1] == 1)
