"""Files that are whole or as they were before, and errors that name their file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an `OSError` from inside the name of `path` if it has none: `write` and `fsync` do not say where."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` when the block ends: written beside, flushed to disk, renamed.

    Whatever ends the block, the process or the machine before, `path` is what it was. The draft is made afresh, so a
    link that lies in its place is never followed. The folder is made, but not what it lies in: that has vanished then.
    """
    draft = path.with_name(path.name + ".tmp")
    with naming(path):
        path.parent.mkdir(exist_ok=True)
        draft.unlink(missing_ok=True)
        try:
            with draft.open("x", encoding="utf-8") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            draft.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise
        flush(path.parent)


def write(path: Path, text: str) -> None:
    """Let `path` hold `text`, as `replacing` does."""
    with replacing(path) as out:
        out.write(text)


def names(folder: Path) -> list[str]:
    """The names in a folder, none if there is no such folder. A folder that cannot be read is an `OSError`.

    `Path.glob` would find nothing in a folder that it may not read.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
