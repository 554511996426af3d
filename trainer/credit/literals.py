"""Finding a literal in text however it is spelled there: escaped, quoted, in other case, with thousands separators.

One definition serves the sanitiser (no literal may leave) and the literal mask (tokens that spell one keep W = 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import quote

# A literal counts where a word begins and ends. The last letter of an escape such as \n or \u0020, as JSON within JSON
# leaves it, is not part of a word; neither is an underscore or a percent escape.
BEFORE = r"(?:(?<![^\W_])|(?<=\\[nrtbf])|(?<=\\u[0-9a-fA-F]{4})|(?<=%[0-9a-fA-F]{2}))"
AFTER = r"(?![^\W_])"
SPACE = r"(?:\s|\\{1,8}[nrt]|\\{1,8}u00a0|\\{1,8}u0020|%20|\+|&nbsp;)+"
ENTITIES = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "#(?:39|x27)"}


def spell(char: str) -> str:
    """A pattern for one character as it stands, as JSON escapes it to any depth, as URLs and HTML do."""
    units = char.encode("utf-16-be").hex()
    escape = "".join(rf"\\{{1,8}}u{units[i : i + 4]}" for i in range(0, len(units), 4))
    ways = [re.escape(char), escape]
    if not char.isalnum():
        ways.insert(1, r"\\{1,8}" + re.escape(char))
    if not char.isalnum() or not char.isascii():
        ways.append(re.escape(quote(char, safe="")))
    if char in ENTITIES:
        ways.append(f"&{ENTITIES[char]};")
    return f"(?:{'|'.join(ways)})"


def spell_number(text: str) -> str:
    """A pattern for a number with or without thousands separators, trailing zeros left to the writer."""
    whole, _, fraction = text.partition(".")
    grouped = r"[,_']?".join(whole)
    fraction = fraction.rstrip("0")
    return grouped + (rf"\.{fraction}0*" if fraction else r"(?:\.0+)?")


def spell_literal(literal: str) -> str:
    """A pattern for one literal, with its borders."""
    if re.fullmatch(r"\d+(?:\.\d+)?", literal):
        return f"{BEFORE}{spell_number(literal)}{AFTER}"
    body = SPACE.join("".join(spell(c) for c in word) for word in literal.split())
    # An identifier (long, with digits) is given away wherever it stands, so it needs no borders.
    if len(literal) >= 6 and any(c.isdigit() for c in literal) and not literal.isdigit():
        return body
    before = BEFORE if literal[0].isalnum() else ""
    after = AFTER if literal[-1].isalnum() else ""
    return f"{before}{body}{after}"


@lru_cache(maxsize=4096)
def compile_literals(literals: tuple[str, ...]) -> re.Pattern[str]:
    ordered = sorted(literals, key=lambda text: (-len(text), text))  # the longest first: it may contain the others
    return re.compile("|".join(spell_literal(text) for text in ordered), re.IGNORECASE)


def pattern(literals: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of `literals`; None when there are none."""
    found = tuple(sorted({text.strip() for text in literals if text.strip()}))
    return compile_literals(found) if found else None


def spans(text: str, literals: Iterable[str]) -> list[tuple[int, int]]:
    """The [start, end) of every literal in `text`."""
    finder = pattern(literals)
    return [match.span() for match in finder.finditer(text)] if finder else []
