"""An allow-list of what a writer needs to read; everything else is masked unread, whatever it encodes.

A writer compares attempts: names of tools and arguments, outcomes, short observations. Those are made of words that can
be pronounced, dates, times, small numbers and short ids such as HAT170. What is long and none of these (keys, hashes,
base64, base58, uuencode, ciphers of mixed letters and digits) is replaced by `[masked opaque N]`, equal texts by equal
numbers, so that a value can still be followed from an observation to an argument. So are rows of short pieces, into
which a longer text may have been split.

Everything is linear in the text's length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache

from trainer.references.spellings import blank, replace

# Of each letter those that follow it in common words, with $ where words end in it; behind the slash those that do so
# now and then, of which a word has one at most. Counted in 8,900 English words, and widened by hand for names and words
# of other languages.
FOLLOW = {
    row[0]: tuple(map(frozenset, row[2:].split("/")))
    for row in """
a:bcdfgiklmnprstuvwxy$/aehjoqz b:abcdefghijlmoprstuwy$/v c:acdehiklmorstuy$/fnpz d:abcdegijlmnoprstuvy$/fhwz
e:abcdefghilmnopqrstvwxyz$/jku f:acefilnorstuy$/bdgmpw g:acefghilmnoprstuy$/bdz h:abdefilmnorstuy$/gpvw
i:abcdefgklmnoprstvxz$/hjquw j:aeiopsuvy/kn k:abdefghiklmnoprstuwy$/jqvz l:acdefgiklmopstuvy$/bhnrwz
m:abdeilmnopsuy$/cfgrtv n:acdefghiklmnopstuvyz$/bjqrw o:abcdefgiklmnoprstuvwxy$/hjqz
p:acdefhilmoprstuwy$/bgnz q:au$/i r:abcdefgiklmnoprstuvwy$/hjqz s:acefhiklmnopstuwy$/dgjqrvz
t:acdefhilmoprstuwy$/jnz u:abcdefgilmnoprstx$/hjkuvyz v:adegilmnosu$/kry w:abdehilnorsw$/cfkptuyz
x:acdefhiloptxy$/buvw y:abcdefgilmnoprstuvwyz$/x z:adehilmorsuwyz$/bkntv
""".split()
}
SPELT = frozenset(
    """
    zero one two three four five six seven eight nine oh double triple
    alfa alpha bravo charlie delta echo foxtrot golf hotel india juliett juliet kilo lima mike november oscar papa
    quebec romeo sierra tango uniform victor whiskey whisky xray yankee zulu
    """.split()
)  # words that stand for one character each
SHORT_WORDS = frozenset(
    """
    am an as at be by do go he hi id if in is it me mr ms my no of oh ok on or pm so to up us vs we
    au da de du el em en es et il im ja je la le li lo ma mi ne ni os ou sa se si su te tu um un wo za zu
    """.split()
)
LONGEST_WORD = 24  # letters; compounds of other languages are longer now and then
LONGEST_ID = 7  # capitals and digits
MOST_DIGITS = 6  # of a number that is not a date
ROOM = 12  # characters of ids, numbers, odd words and odd marks in one token, or in a row of tokens

STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
ESCAPE = re.compile(r"\\(?:([nrtbf])|(\")|.)")
BARE = re.compile(r"[^\s\[\]{},:]+")  # of JSON outside strings
DENSE = re.compile(r"[^\w\s]{9}")
TOKEN = re.compile(r"\S+")
EDGES = "[](){}<>\"'.,;:!?"
RUN = re.compile(r"[^\W_]+")
YEAR, MONTH, DAY, MARK = r"(?:19|20)\d\d", r"(?:0?[1-9]|1[0-2])", r"(?:0?[1-9]|[12]\d|3[01])", r"[-/.]"
CLOCK = r"(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d{1,6})?)?(?:Z|[+-]\d\d:?\d\d)?"
DATE = rf"{YEAR}(?:{MARK}{MONTH}{MARK}{DAY})?|{DAY}{MARK}{DAY}{MARK}{YEAR}"
TIME = re.compile(rf"(?<![^\W_])(?:{DATE})(?![^\W_S-Z])(?:T{CLOCK})?|(?<![\w:]){CLOCK}(?![\w:])")
NUMBER = re.compile(rf"[-+$\u20ac\u00a3]{{0,2}}\d{{1,{MOST_DIGITS}}}(?:\.\d{{1,4}})?[%\u20ac]?")
ODD_MARKS = re.compile(r"[^\w\s./()'=-]")
PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
NUMBERED = re.compile(r"[A-Za-z]{5,9}\d")  # address1
SHORT_ID = re.compile(rf"[A-Z0-9]{{2,{LONGEST_ID}}}|[A-Za-z]{{1,4}}\d{{1,4}}|\d{{1,4}}[a-z]{{1,3}}|[A-Za-z]{{1,4}}")


def is_ordinary(run: str, known: Collection[str] = ()) -> bool:
    """Whether letters and digits in a row are a word, several in camelCase, or a name that `known` has."""
    return run in known or _is_word(run)


@lru_cache(maxsize=65_536)
def _is_word(run: str) -> bool:
    if not run.isalpha() or len(run) > LONGEST_WORD:
        return False
    if not run.isascii():
        return _of_one_script(run)
    if len(run) <= 2:
        return run.lower() in SHORT_WORDS and not run.isupper()
    parts = PARTS.findall(run)
    long = [part for part in parts if len(part) > 2]  # iPhone and McDonald have one part that is shorter
    return len(run) >= 3 * len(parts) - 1 and len(parts) - len(long) <= 1 and all(map(_is_pronounceable, long))


def _is_pronounceable(part: str) -> bool:
    """Whether its pairs of letters are those of common words, but for one, and there is a vowel."""
    low = part.lower()
    rare = 0
    for letter, after in zip(low, low[1:] + "$"):
        common, unusual = FOLLOW[letter]
        if after not in common:
            rare += 1 if after in unusual else 2
    return rare <= 1 and not set(low).isdisjoint("aeiouy")


def _of_one_script(run: str) -> bool:
    """Whether all letters belong to one living script; Latin ones with accents must be pronounceable without these."""
    scripts = {unicodedata.name(char, "?").split()[0] for char in run}
    if scripts <= {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK", "HANGUL"}:
        return all(ord(char) < 0x20000 and not 0x3400 <= ord(char) < 0x4E00 for char in run)
    if len(scripts) > 1:
        return False
    if scripts == {"LATIN"}:
        bare = "".join(c for c in unicodedata.normalize("NFKD", run) if c.isascii() and c.isalpha())
        return len(bare) >= len(run) / 2 and all(map(_is_pronounceable, PARTS.findall(bare)))
    return scripts <= {
        *("CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "TAMIL", "TELUGU", "THAI", "GEORGIAN"),
        *("ARMENIAN", "GUJARATI", "GURMUKHI", "KANNADA", "MALAYALAM", "KHMER", "LAO", "MYANMAR", "SINHALA", "ETHIOPIC"),
    }


def _unescape(match: re.Match[str]) -> str:
    """An escape as spaces if it stands for white space, in as many characters."""
    return "  " if match[1] else ' "' if match[2] else match.group()


class OrdinaryText:
    """The allow-list for one request: numbers what it masks, by first appearance."""

    def __init__(self, known: Collection[str], mask: Callable[[int], str], marks: re.Pattern[str]) -> None:
        """`known`: runs of letters and digits that stay whatever they are; `marks`: masks that are there already."""
        self._known, self._mask, self._marks = known, mask, marks
        self._numbers: dict[str, int] = {}

    def line(self, text: str) -> str:
        """One JSON value without what is not ordinary."""
        pieces: list[tuple[int, int, str]] = []  # [start, end) and what it is numbered by
        row: list[tuple[int, int]] = []
        size = 0

        def close_row() -> None:
            if len(row) > 1 and size > ROOM:  # all by one number, since equal pieces would show a pattern
                whole = text[row[0][0] : row[-1][1]]
                pieces.extend((start, end, whole) for start, end in row)
            row.clear()

        for start, end in self._tokens(text):
            odd, opaque = self._judge(text[start:end])
            if opaque:
                pieces.append((start, end, text[start:end]))
            elif odd:
                row.append((start, end))
                size += odd
            else:
                close_row()
                size = 0
        close_row()
        return replace(text, [(start, end, self._number(by)) for start, end, by in sorted(pieces)])

    def _tokens(self, text: str) -> Iterator[tuple[int, int]]:
        """The [start, end) of each token in the strings of a JSON text, and of its numbers."""
        marks = [match.span() for match in self._marks.finditer(text)]
        shown, before, after = blank(text, marks), {end for _, end in marks}, {start for start, _ in marks}
        strings = [match.span() for match in STRING.finditer(shown)]
        outside = blank(shown, strings)
        for start, end in sorted([*strings, *(match.span() for match in BARE.finditer(outside))]):
            inside = ESCAPE.sub(_unescape, shown[start:end]) if shown[start] == '"' else shown[start:end]
            for token in TOKEN.finditer(inside):
                word = token.group()
                first = token.start() + len(word) - len(word.lstrip(EDGES))
                last = token.start() + len(word.rstrip(EDGES))
                if DENSE.search(word) or first >= last:  # edges that are a text of their own
                    if len(word) < 9 and (start + token.start() in before or start + token.end() in after):
                        continue  # or what was left when the text between them was masked
                    first, last = token.start(), token.end()
                    first += inside[first] == '"'
                    last -= last == len(inside)
                if first < last:
                    yield start + first, start + last

    def _number(self, text: str) -> str:
        return self._mask(self._numbers.setdefault(text, len(self._numbers) + 1))

    def _judge(self, token: str) -> tuple[int, bool]:
        """How many characters of a token are of no language, and whether it is masked."""
        token = TIME.sub("", token)
        if NUMBERED.fullmatch(token) and _is_word(token[:-1]):
            return 0, False
        if NUMBER.fullmatch(token):
            return sum(map(str.isdigit, token)), False
        runs = RUN.findall(token)
        letters = sum(map(len, runs))
        if len(token) - letters > max(letters, 8):
            return 0, len(set(token)) > 1  # a ruled line may stay
        strange = [run for run in runs if not is_ordinary(run, self._known) or run.lower() in SPELT]
        odd, marks = sum(map(len, strange)), len(ODD_MARKS.findall(token))
        if not runs:
            return len(token), False
        even = len(runs) >= 4 and {len(run) for run in runs[:-1]} == {max(map(len, runs))} and len(runs[0]) > 2
        room = odd > ROOM or (odd > 1 and marks > 2) or (odd > 3 and odd + marks > ROOM)
        return odd and odd + marks, even or room or not all(map(self._may_stay, strange))

    def _may_stay(self, run: str) -> bool:
        if run.isdecimal():
            return len(run) <= MOST_DIGITS
        return run.lower() in SPELT or SHORT_ID.fullmatch(run) is not None


def words_of(tools: Collection[object]) -> frozenset[str]:
    """The letters-and-digits runs of everything that the offered tools' schemas say."""
    found: set[str] = set()
    todo = list(tools)
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, str):
            found.update(run for run in RUN.findall(value) if len(run) <= LONGEST_WORD)
    return frozenset(found)
