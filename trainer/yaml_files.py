"""YAML from a file or a command line as plain data: bounded, and without a word of its text in an error.

A name may lead anywhere (`base: /etc/shadow`, a pipe, /dev/urandom), so only regular files that end in .yaml or .yml
are read, up to `MAX_BYTES`, and a few lines that multiply by aliases are refused before they are built.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError

SUFFIXES = (".yaml", ".yml")
MAX_BYTES = 256 * 1024
MAX_VALUES = 20_000  # after aliases are followed
MAX_SHOWN = 200  # characters of a path


def read(path: Path, missing: str = "") -> Any:
    """The data in a YAML file; `missing` follows the message that there is no such file.

    Raises:
        UserError: it is no file, no YAML file, or not readable; the message names the file and no part of its text.
    """
    name = show(path)
    text = _text(path, name, missing)
    try:
        return parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        what = str(error) if isinstance(error, Refusal) else "syntax error"
        raise UserError(f"{name}: is not valid YAML ({where}{what})") from None


def show(path: Path) -> str:
    """A path for a message, cut in the middle if it is long."""
    text = str(path)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]}...{text[-MAX_SHOWN // 2 :]}"


def _text(path: Path, name: str, missing: str) -> str:
    try:
        if not os.path.realpath(path).endswith(SUFFIXES):  # of what a link leads to: its name promises that it is YAML
            if not os.path.lexists(path):
                raise FileNotFoundError
            raise UserError(f"{name}: is no YAML file; the name of a config, and of its `base`, ends in .yaml")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{name}: is no regular file; give a YAML file or a run's folder")
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{name}: is larger than {MAX_BYTES // 1024} KiB, which no config is")
        return data.decode()
    except FileNotFoundError:
        raise UserError(f"{name}: no such file{missing}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name}: cannot be read (it is not UTF-8); give a YAML file or a run's folder") from None
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        why = (error.strerror if isinstance(error, OSError) else None) or "its name has a NUL character"
        raise UserError(f"{name}: cannot be read ({why}); give a YAML file or a run's folder") from None


class Refusal(yaml.YAMLError):
    """YAML that is refused for what it means; the message names keys at most."""

    def __init__(self, message: str, mark: Any = None) -> None:
        super().__init__(message)
        self.problem_mark = mark


def parse(text: str) -> Any:
    """YAML as plain data. A key that stands twice, and an alias inside what it names, are refused.

    Raises:
        yaml.YAMLError: it is none.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, set())
        return loader.construct_document(node)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        deep = "it nests too deeply" if isinstance(error, RecursionError) else ""
        quotes = "'" in str(error)  # its text
        raise Refusal(deep or ("a value is not of its kind" if quotes else str(error))) from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                name = self.construct_object(key)
                if name in seen:
                    raise Refusal(f"the key {str(name)[:60]!r} stands twice", key.start_mark)
                seen.add(name)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def _count(node: Any, sizes: dict[int, int], above: set[int]) -> int:
    """The values in a node after aliases are followed."""
    if id(node) in above:
        raise Refusal("an alias stands inside what it names")
    if id(node) not in sizes:
        above.add(id(node))
        inside = node.value if isinstance(node.value, list) else []
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_count(part, sizes, above) for part in parts)
        above.discard(id(node))
        if sizes[id(node)] > MAX_VALUES:
            raise Refusal(f"its aliases make more than {MAX_VALUES} values")
    return sizes[id(node)]
