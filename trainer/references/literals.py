"""Finds a literal in text in any spelling: escaped, quoted, in another case, numbers and dates in other formats.

One definition serves the sanitiser (no literal may leave) and the literal mask (tokens that spell one keep W = 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import quote

from trainer.references.numbers_and_dates import date_of, number_of, number_spans, spell_date
from trainer.references.spellings import plain, squeeze, union

# A literal counts where a word begins and ends. The last letter of an escape such as \n or \u0020, as JSON within JSON
# leaves it, is not part of a word; neither is an underscore or a percent escape.
BEFORE = r"(?:(?<![^\W_])|(?<=\\[nrtbf])|(?<=\\u[0-9a-fA-F]{4})|(?<=%[0-9a-fA-F]{2}))"
AFTER = r"(?![^\W_])"
WRITTEN_NUMBER = re.compile(r"\d+(?:\.\d+)?")
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
    if WRITTEN_NUMBER.fullmatch(literal):
        return f"{BEFORE}{spell_number(literal)}{AFTER}(?!,000(?!\\d))"  # 5,000 is no 5
    if day := date_of(literal):
        return f"{re.escape(literal)}|{BEFORE}(?:{spell_date(day)}){AFTER}"
    body = SPACE.join("".join(spell(c) for c in word) for word in literal.split())
    # An identifier (long, with digits) is given away wherever it stands, so it needs no borders.
    if len(literal) >= 6 and any(c.isdigit() for c in literal) and not literal.isdigit():
        return body
    before = BEFORE if literal[0].isalnum() else ""
    after = AFTER if literal[-1].isalnum() else ""
    return f"{before}{body}{after}"


@lru_cache(maxsize=4096)
def compile_literals(literals: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that finds any of `literals`, of which there is one at least."""
    ordered = sorted(literals, key=lambda text: (-len(text), text))  # the longest first: it may contain the others
    return re.compile("|".join(spell_literal(text) for text in ordered), re.IGNORECASE)


def trace(literal: str) -> str:
    """Letters and digits that are in a text, squeezed, wherever any spelling of `literal` is in it."""
    if day := date_of(literal):
        return str(day.year)
    return squeeze(plain(literal.partition(".")[0] if WRITTEN_NUMBER.fullmatch(literal) else literal))


class Literals:
    """Known strings. Only those whose letters a text has at all are looked for: a pattern costs time for each."""

    def __init__(self, literals: Iterable[str]) -> None:
        self._traces = {text: trace(text) for literal in sorted(set(literals)) if (text := literal.strip())}
        self._numbers = {number for text in self._traces if (number := number_of(text))}

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The [start, end) of every literal in `text`, in rising order."""
        if not self._traces:
            return []
        bare = plain(text)
        squeezed = {squeeze(text), squeeze(bare) if bare != text else ""}
        there = tuple(lit for lit, mark in self._traces.items() if any(mark in words for words in squeezed))
        found = [match.span() for match in compile_literals(there).finditer(text)] if there else []
        return [*union(found, number_spans(text, self._numbers))] if self._numbers else found


@lru_cache(maxsize=256)
def literals_of(literals: tuple[str, ...]) -> Literals:
    return Literals(literals)


def spans(text: str, literals: Iterable[str]) -> list[tuple[int, int]]:
    """The [start, end) of every literal in `text`."""
    return literals_of(tuple(literals)).spans(text)
