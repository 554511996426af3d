"""Payment cards in text: digits that begin as an issuer's numbers do and whose checksum fits, however grouped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate, pairwise

# The longest run of digits with anything but letters and digits in the gaps; a run begins where no digit is before it.
RUN = re.compile(r"(?<![\d.])\d(?:[^0-9A-Za-z]{0,48}\d){12,}")
GROUP = re.compile(r"\d+")
NUMBER = re.compile(  # of the issuers in use; any other number of such a length is an order, a time, an id
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|62\d{14,17}|5[06-9]\d{11,17}"
)
FLOAT = re.compile(r"(?<![\d.])(\d)\.(\d{10,18})[eE]\+?(1[2-8])(?!\d)")
SHORTEST, LONGEST = 13, 19  # digits
AMEX = ((4, 6, 5), (4, 6, 4))


def luhn(digits: str) -> bool:
    """The checksum of payment cards."""
    doubled = sum(map("0516273849".index, digits[-2::-2]))  # 5 doubled is 10, whose digits make 1; and so on
    return (sum(map(int, digits[-1::-2])) + doubled) % 10 == 0


def spans(text: str) -> list[tuple[int, int]]:
    """The [start, end) of every group of digits that belongs to a card's number, in rising order."""
    found: set[tuple[int, int]] = set()
    for run in RUN.finditer(text):
        groups = [(m.start() + run.start(), m.end() + run.start()) for m in GROUP.finditer(run.group())]
        for first, last in windows(text, groups):
            found.update(groups[first : last + 1])
    for match in FLOAT.finditer(text):  # 4111111111111111 as a program prints it that took it for a measurement
        digits, size = (match[1] + match[2]).rstrip("0"), int(match[3]) + 1
        digits = digits.ljust(size, "0")
        if NUMBER.fullmatch(digits) and luhn(digits):
            found.add(match.span())
    return sorted(found)


def windows(text: str, groups: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Pairs of indices: the groups from one to the other, both included, are a card's number."""
    digits = "".join(text[start:end] for start, end in groups)
    begins = list(accumulate((end - start for start, end in groups), initial=0))
    ends = {end: number for number, end in enumerate(begins[1:])}
    for first, begin in enumerate(begins[:-1]):
        for end in range(begin + SHORTEST, begin + LONGEST + 1) if digits[begin] in "23456" else ():
            is_card = end in ends and NUMBER.fullmatch(digits, begin, end) and luhn(digits[begin:end])
            if is_card and grouped(text, groups[first : ends[end] + 1]):
                yield first, ends[end]


def grouped(text: str, groups: list[tuple[int, int]]) -> bool:
    """Whether these groups are of one number: cut evenly or as some cards are, or with next to nothing between."""
    sizes = tuple(end - start for start, end in groups)
    if (all(size == sizes[0] for size in sizes[:-1]) and sizes[-1] <= sizes[0]) or sizes in AMEX:
        return True
    return min(sizes) >= 3 and all(after[0] - before[1] <= 1 for before, after in pairwise(groups))
