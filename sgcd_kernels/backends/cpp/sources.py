"""A digest of the extension's sources. Imports only the standard library: setup.py runs this file before installing."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(csrc: Path) -> str:
    """A short hash of the files of a folder: names and contents."""
    hashed = hashlib.sha256()
    for path in sorted(csrc.iterdir()):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()[:16]
