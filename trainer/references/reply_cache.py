"""Replies on disk, keyed by the content that led to them. Writing is atomic; a damaged entry is as good as none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from trainer import files


def key_of(*parts: Any) -> str:
    """The content hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class ReferenceCache:
    """A folder of small JSON files. Several runs may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> dict[str, Any] | None:
        try:
            entry = json.loads(files.read(self.path(key)))
        except (OSError, ValueError):
            return None
        return entry if isinstance(entry, dict) else None

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Store an entry. A full or read-only disk costs the cache, never the run."""
        path = self.path(key)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as out:
                    json.dump(entry, out, ensure_ascii=False)
                    out.flush()
                    os.fsync(out.fileno())
                Path(draft).replace(path)
                files.flush(path.parent)
            except OSError:
                Path(draft).unlink(missing_ok=True)
