"""What the extension is compiled from. Imports nothing: setup.py runs this file before there is a package."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(csrc: Path) -> str:
    """A short name for the contents of a folder of C++ files."""
    hashed = hashlib.sha256()
    for path in sorted(csrc.iterdir()):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()[:16]
