"""Strings that are secret wherever they occur: parts of values that were masked because of the name beside them, and
values of this process's environment.

Ordinary text is never treated as secret: words of letters only (unless quoted, and not a placeholder), short numbers,
years, dates.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

PART = re.compile(r"[^\s,;:=()\[\]{}<>|\"'`\\]+")
ENDS = " \t\n\"'`\\.,;:!?()[]{}<>"
ORDINARY = re.compile(r"(?:19|20)\d\d(?:-\d\d(?:-\d\d.*)?)?|\d{1,2}/\d{1,2}/\d{2,4}|\d+\.\d+|[A-Za-z]+")
PLACEHOLDERS = frozenset(
    """
    string boolean number required optional missing invalid incorrect correct unknown undefined default example
    hidden redacted masked visible private public password passcode secret token access_token credential credentials
    account checking savings primary bearer changeme please reset updated changed expired enabled disabled active
    pending verified success failure
    """.split()
)
URL_PASSWORD = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")
SHORTEST_OWN = 6  # characters of a value of the environment; a shorter one would be found in every text


def telling(kind: str, value: Any, *, whole: bool, alone: bool = True) -> Iterator[str]:
    """The telling parts of a masked value.

    `whole`: it is a value from end to end, as quotes or JSON show. `alone`: no sentence continues behind it.
    """
    if isinstance(value, Mapping | list | tuple):
        for leaf in value.values() if isinstance(value, Mapping) else value:
            yield from telling(kind, leaf, whole=whole, alone=alone)
    elif value is not None and not isinstance(value, bool):
        text = str(value).strip(ENDS)
        parts = [part for found in PART.findall(text) if (part := found.strip(ENDS))]
        alone = whole or (alone and len(text.split()) == 1)
        yield from (part for part in parts if unusual(kind, part, alone=alone))
        ordinary = text.lower() in PLACEHOLDERS or "masked " in text
        if kind != "account" and whole and len(text) >= SHORTEST_OWN and not ordinary:
            yield text


def unusual(kind: str, word: str, *, alone: bool) -> bool:
    """Whether a word with digits in it is no word of ordinary text."""
    if ORDINARY.fullmatch(word) or not any(char.isdigit() for char in word):
        return False
    if word.isdigit():  # an account's digits must be many: its balance has some, too
        return len(word) >= (8 if kind == "account" else 4 if alone else 6)
    return len(word) >= (6 if kind == "account" else 5)


def own_secrets(named: re.Pattern[str]) -> list[str]:
    """This process's own: values of environment variables that are named as secrets are, and passwords in URLs."""
    found = [value for name, value in os.environ.items() if named.search(name) and not is_path(value)]
    found += [unquote(match[1]) for value in os.environ.values() for match in URL_PASSWORD.finditer(value)]
    return [value for text in found if len(value := text.strip()) >= SHORTEST_OWN and not ordinary_word(value)]


def is_path(value: str) -> bool:
    """Whether it names something on this machine: $SSH_AUTH_SOCK is no secret, but a key may begin with a slash."""
    try:
        return value.startswith("/") and Path(value).exists()
    except (OSError, ValueError):
        return False


def ordinary_word(value: str) -> bool:
    return len(value) < 8 and value.isalpha() and (value.islower() or value.istitle())
