"""The folders `checkpoints/step_N`: which there are, whether they are whole, and how one takes its place.

A checkpoint is written as `.writing-step_N`, sealed with a manifest of every file's size and CRC-32, flushed to disk
and renamed. If `step_N` is there already, that is first renamed to `.writing-old-step_N`. A kill between two renames
leaves whole folders under such names: `recover` gives them their place back.

CRC-32 because the standard library has it, at 1 to 3 GB/s and beside the flush. It sees every change of up to 32 bits
in a row, and all but 2**-32 of the others; what somebody changed on purpose, the manifest included, it cannot see.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError

from trainer import files
from trainer.errors import UserError

STATE = "state"
MANIFEST = f"{STATE}/manifest.json"
NEWEST = "newest_checkpoint"  # in the run's folder: the name of the newest checkpoint that was ever written
TEMPORARY = ".writing-"
_OLD = f"{TEMPORARY}old-"
_DAMAGED = "damaged-"
_STEP = re.compile(r"step_([1-9]\d{0,17})")  # one name for each step
_CHUNK = 1 << 20  # bytes
FORMAT = 1  # of manifests; what another one means is not known here


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: damaged checkpoint ({why}); use another one, or put back a whole copy of it")
        self.path, self.why = path, why


def _relative(name: str) -> str:
    """The name of a file below the manifest's folder."""
    if "\0" in name or not name.isprintable() or {"", ".", ".."} & set(name.split("/")):
        raise ValueError("it names a file outside the folder")
    return name


class WrittenFile(BaseModel, strict=True):
    """What was written into a file."""

    bytes: NonNegativeInt
    crc32: str


class Manifest(BaseModel, strict=True):
    """What a checkpoint is: its step, and every file of it by its name below the folder."""

    step: PositiveInt
    files: Annotated[dict[Annotated[str, AfterValidator(_relative)], WrittenFile], Field(min_length=1)]


def step_of(path: Path) -> int | None:
    """N of a folder called step_N."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def found(output_dir: Path) -> list[Path]:
    """The folders step_N of a run by rising step, whole or not."""
    folder = output_dir / "checkpoints"
    paths = [folder / name for name in files.names(folder)]
    steps = [(step, path) for path in paths if (step := step_of(path)) is not None]
    return [path for _, path in sorted(steps)]


def latest(output_dir: Path, note: Callable[[str], object] = lambda line: None) -> Path | None:
    """The newest checkpoint that verifies, or None if there is none at all; `note` is told of newer ones that do not.

    Raises:
        DamagedCheckpoint: there are some, and none verifies.
        OSError: one cannot be read, which says nothing about what it holds.
    """
    damaged: list[DamagedCheckpoint] = []
    for path in reversed(found(output_dir)):
        try:
            verify(path)
        except DamagedCheckpoint as error:
            damaged.append(error)
        else:
            for each in damaged:
                note(f"{each}: {path.name} is used instead")
            return path
    if damaged:
        raise damaged[0]
    return None


def is_sealed(path: Path) -> bool:
    """Whether a folder has a manifest, and so is a checkpoint of ours and not only a model."""
    return (path / MANIFEST).exists()


def verify(path: Path) -> Manifest:
    """The manifest of a checkpoint of which every file holds the bytes that were written.

    Raises:
        DamagedCheckpoint: a file is gone, or another than was written.
        UserError: another version of this package wrote it.
        OSError: a file cannot be read.
    """
    manifest = _read_manifest(path)
    if step_of(path) not in (None, manifest.step):
        raise DamagedCheckpoint(path, f"it holds step {manifest.step}")
    for name, written in manifest.files.items():
        try:
            now = _describe(path / name)
        except _NotThere:
            raise DamagedCheckpoint(path, f"{name} is gone") from None
        if now != written:
            size = f"{now.bytes} bytes, {written.bytes} were written"
            what = "other bytes than were written" if now.bytes == written.bytes else size
            raise DamagedCheckpoint(path, f"{name} has {what}")
    return manifest


def _read_manifest(path: Path) -> Manifest:
    """The manifest of a folder: first whether it is what was written, then whether it means something here."""
    try:
        _check_there(path / MANIFEST)
        content = json.loads(files.read(path / MANIFEST))
        sealed = content.pop("crc32") == _crc32_of(content)
    except (_NotThere, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise DamagedCheckpoint(path, f"no readable {MANIFEST}") from None
    if not sealed:
        raise DamagedCheckpoint(path, f"{MANIFEST} is not what was written")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path}: another version of this package wrote it (manifest format {content.get('format')!r:.20}, this "
            f"one reads {FORMAT}); resume with that version, or choose another --output_dir"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        what = ascii(".".join(map(str, error.errors()[0]["loc"])))[1:-1]  # of a file: it may hold anything
        raise DamagedCheckpoint(path, f"{MANIFEST} has no valid {what:.60}") from None


def seal(folder: Path, **facts: Any) -> None:
    """Write the manifest of `folder` (`facts`, and all its files), and wait until everything is on disk."""
    (folder / STATE).mkdir(exist_ok=True)
    paths = _everything_in(folder)
    with ThreadPoolExecutor(2, "crc32") as pool:  # while the disk is waited for; zlib gives up the interpreter's lock
        described = {str(path.relative_to(folder)): pool.submit(_describe, path) for path in paths if not path.is_dir()}
        for path in paths:
            files.flush(path)
    written = {name: future.result().model_dump() for name, future in described.items()}
    content = {"format": FORMAT, **facts, "files": written}
    files.write(folder / MANIFEST, json.dumps({**content, "crc32": _crc32_of(content)}, indent=1))
    files.flush(folder)


def publish(folder: Path, output_dir: Path) -> Path:
    """Give a sealed folder `.writing-step_N` its name; give that."""
    target = folder.with_name(folder.name.removeprefix(TEMPORARY))
    files.write(output_dir / NEWEST, f"{target.name}\n")  # before it has its name: `recover` gives it that
    old = target.with_name(_OLD + target.name)
    if target.exists():  # a step that is saved again: the old one is there until the new one is
        target.rename(old)
    folder.rename(target)
    files.flush(target.parent)
    if old.exists():
        shutil.rmtree(old)
    return target


def recover(output_dir: Path) -> None:
    """Give whole folders that an interrupted save or removal left their names back, and remove what is not whole.

    Only the process that holds the run may do this: in another one, a folder may be about to get its name.
    """
    folder = output_dir / "checkpoints"
    for prefix in (TEMPORARY, _OLD):  # the newer state of a step first
        for name in files.names(folder):
            target = folder / name.removeprefix(prefix)
            named = name.startswith(prefix) and step_of(target) is not None
            if named and not target.exists() and _is_whole(folder / name):
                (folder / name).rename(target)
                files.flush(folder)
    for name in files.names(folder):
        if name.startswith(TEMPORARY):
            _delete(folder / name)


def keep_newest(output_dir: Path, limit: int) -> None:
    """Remove the oldest checkpoints, so that `limit` are left. Renamed first, so that no folder step_N is in parts."""
    for path in found(output_dir)[:-limit]:
        gone = path.with_name(_OLD + path.name)
        path.rename(gone)
        _delete(gone)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one; it is kept for its owner to look at."""
    names = [path.with_name(f"{_DAMAGED}{path.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(1, 100)))]
    kept = next((name for name in names if not name.exists()), names[-1])
    path.rename(kept)
    return kept


def was_there(output_dir: Path) -> str:
    """The name of the newest checkpoint that this run ever had; "" if it had none."""
    try:
        return files.read(output_dir / NEWEST).decode(errors="replace").strip()[:40] or "a checkpoint"
    except FileNotFoundError:
        return ""


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except DamagedCheckpoint:
        return False
    return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _everything_in(folder: Path) -> list[Path]:
    """Files and folders at any depth. `rglob` would leave out, without a word, what it may not list."""
    paths = [folder / name for name in files.names(folder)]
    return [each for path in paths for each in (path, *(_everything_in(path) if path.is_dir() else ()))]


class _NotThere(Exception):
    """There is no regular file of this name."""


_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)


def _check_there(path: Path) -> None:
    """Raise `_NotThere` where no regular file is: that is damage, where an error of the disk is none."""
    try:
        files.check_regular(path)
    except OSError as error:
        if error.errno in _NOWHERE:
            raise _NotThere from None
        raise


def _describe(path: Path) -> WrittenFile:
    """Size and checksum of a file."""
    _check_there(path)
    crc, size = 0, 0
    with files.naming(path), path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while chunk := file.read(_CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return WrittenFile(bytes=size, crc32=f"{crc:08x}")


def _crc32_of(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
