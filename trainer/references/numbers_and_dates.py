"""Numbers and dates as values: 12500 is also 12.5k, 1.25e4 and 12.500,00; 2024-05-20 is also May 20, 2024."""

from __future__ import annotations

import calendar
import re
from collections.abc import Collection, Iterator
from datetime import date, datetime

# Thousands in groups (bounded, so that a row of numbers takes linear time), or digits; a fraction; a power of ten.
NUMBER = re.compile(
    r"(?<![^\W_])(?:(?P<groups>\d{1,3}(?:[,.'_ ]\d{3}){1,5})|(?P<whole>\d+))(?:[.,](?P<fraction>\d+))?"
    r"(?:e(?P<power>[+-]?\d{1,2}))?(?:[ -]?(?P<unit>k|thousand|m|mn|million))?(?![^\W_])",
    re.IGNORECASE,
)
PLAIN = re.compile(r"[-+$\u20ac\u00a3]?(\d{1,12}(?:\.\d{1,12})?)")  # longer numbers are names of something
POWERS = {"k": 3, "thousand": 3, "m": 6, "mn": 6, "million": 6}
DATES = ("%Y-%m-%d", "%Y/%m/%d", "%B %d, %Y", "%d %B %Y", "%b %d, %Y", "%d %b %Y")


def key(value: float) -> str:
    """Equal for what differs by the rounding of a computer's arithmetic."""
    return f"{value:.12g}"


def number_of(literal: str) -> str | None:
    """The key of a literal that is a number, whatever its sign."""
    match = PLAIN.fullmatch(re.sub(r"(?<=\d),(?=\d{3})", "", literal))
    return key(float(match[1])) if match else None


def number_spans(text: str, wanted: Collection[str]) -> list[tuple[int, int]]:
    """The [start, end) of every number in `text` whose key is wanted."""
    return [m.span() for m in NUMBER.finditer(text) if any(key(value) in wanted for value in readings(m))]


def readings(match: re.Match[str]) -> Iterator[float]:
    """What a number may mean: 12.500 is twelve thousand and a half, or twelve and a half."""
    power = int(match["power"] or 0) + POWERS.get((match["unit"] or "").lower(), 0)
    fraction = match["fraction"] or "0"
    if match["whole"]:
        yield float(f"{match['whole']}.{fraction}e{power}")
    else:
        *parts, last = re.split(r"\D", match["groups"])
        yield float(f"{''.join(parts)}{last}.{fraction}e{power}")
        marks = set(re.findall(r"\D", match["groups"]))
        if len(marks) == len(parts) <= 2 and last != "000":  # 12.500 and 12,500.125, not 1,250,000 and 5,000
            yield float(f"{''.join(parts)}.{last}e{power}")


def date_of(literal: str) -> date | None:
    for form in DATES:
        try:
            return datetime.strptime(literal, form).date()
        except ValueError:
            continue
    return None


def spell_date(day: date) -> str:
    """A pattern for a date with its year: in any order, the month as a number or a word."""
    names = rf"0?{day.month}|{calendar.month_name[day.month]}|{calendar.month_abbr[day.month]}\.?"
    d, m, y = rf"0?{day.day}(?:st|nd|rd|th)?", f"(?:{names})", str(day.year)
    gap = r"[\s\-/.,_]{0,3}(?:of\s)?"
    return "|".join(gap.join(order) for order in ((y, m, d), (d, m, y), (m, d, y)))
