"""Disguised spellings of literals: normalised if the text stays readable, else searched for.

`plain` normalises escapes of JSON, URLs and HTML to any depth, look-alike digits and letters, and invisible characters.
`Apart` finds a literal whose characters are separated, reversed, or spread over several fields; `unwrap` decodes runs
of base64, base32 and hex, and rows of character codes. A cipher invented by the writer is not found.

Everything is linear in the text's length.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from urllib.parse import unquote

Spans = Sequence[tuple[int, int]]  # [start, end), rising

ROUNDS = 5  # of escapes inside escapes
SHORTEST = 5  # letters and digits of a literal that is searched apart: a shorter one would be found in every text

ESCAPE = re.compile(
    r"\\{1,16}(?:u\{([0-9a-fA-F]{1,6})\}|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|(?P<blank>[nrt]))"
)
PERCENT = re.compile(r"%[0-9a-fA-F]{2}")
ENTITY = re.compile(r"&(?:#\d|#[xX][0-9a-fA-F]|[A-Za-z]{2})")
CONTROLS = {c: None for c in [*range(32), 127] if chr(c) not in "\n\t"}
# Drawn as nothing though no control or format character: joiners, fillers, selectors of a glyph's variant.
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]")
# Letters of Cyrillic, Greek, Armenian and Cherokee that are drawn as Latin ones are, and a dotless i.
TWINS = dict(zip("авекмнорстухіјѕԁɡһԛѡαβεικνορτυχı", "abekmhopctyxijsdghqwabeikvoptuxi"))
TWINS |= dict(zip("օոսհցզքյլ" + "ᎪᏴᏟᎠᎬᏀᎻᎥᎫᏦᏞᎷᎾᏢᎡᏒᏚᎢᏙᏔᏃ", "onuhgqpjl" + "abcdeghijklmoprrstvwz"))
# A letter of another shape, by its name in Unicode: small capitals, in a black circle or square, of a flag.
SHAPED = re.compile(r"(?:LATIN LETTER SMALL CAPITAL|LATIN CAPITAL LETTER|REGIONAL INDICATOR SYMBOL LETTER) ([A-Z])$")
GAP = re.compile(r"[\W_]+")
FRAME = re.compile(r"[\"'\n\w{}\[\]]")
STRING = re.compile(r'"(?:[^"\\\n]|\\[^\n])*"(?P<key>\s?:)?')
BASE64 = re.compile(
    r"(?<![A-Za-z0-9+/_-])(?:[A-Za-z0-9+/_-]{40,}(?:\r?\n[A-Za-z0-9+/_-]{4,})*|[A-Za-z0-9+/_-]{6,})={0,2}"
)
HEX = re.compile(r"(?:0x)?[0-9a-fA-F]{2}(?:[ :,-]{0,2}(?:0x)?[0-9a-fA-F]{2}){3,}[0-9a-fA-F]?")
BASE32 = re.compile(r"[A-Z2-7]{8,}")
# A row of numbers that may be codes of characters, in any base: chr(90)+chr(97), \132\141, =5A=61, [90, 97]
CODE = r"(?:0[xob])?[0-9a-fA-F]{2,6}"
CODES = re.compile(rf"(?<![0-9A-Za-z]){CODE}(?:[^0-9A-Za-z]{{1,12}}(?:(?:chr|[uUx])[^0-9A-Za-z]{{0,2}})?{CODE}){{3,}}")
NO_CODE = "\0"
ROW = re.compile(f"[^{NO_CODE}]{{4}}")
LEAST = 3  # characters of a find in a row of numbers


def plain(text: str) -> str:
    """`text` without escapes and invisible characters, with look-alikes in one spelling (NFKC, ASCII digits)."""
    for _ in range(ROUNDS):
        before = text
        if "\\" in text:
            text = ESCAPE.sub(_character, text)
        if "%" in text and PERCENT.search(text):
            text = unquote(text)
        if "&" in text and ENTITY.search(text):
            text = html.unescape(text)
        if not text.isascii():
            text = UNSEEN.sub("", unicodedata.normalize("NFKC", text))
            text = "".join(map(_seen, text))
        if text == before:
            break
    return text.translate(CONTROLS)


def _character(match: re.Match[str]) -> str:
    if match["blank"]:
        return "\t" if match["blank"] == "t" else "\n"
    code = int(next(group for group in match.groups() if group), 16)
    return chr(code) if code <= 0x10FFFF else ""


@lru_cache(maxsize=4096)
def _seen(char: str) -> str:
    """Any script's digit as ASCII, "" for an invisible character, else the character."""
    if char.isascii():
        return char
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    if shaped := SHAPED.search(unicodedata.name(char, "")):
        return shaped[1]
    return "" if kind in ("Cf", "Cs", "Co", "Cc") else char


@lru_cache(maxsize=4096)
def fold(char: str) -> str:
    """The letters and digits that a character stands for, without case and accents; "" for any other character."""
    if char.isascii():
        return char.lower() if char.isalnum() else ""
    bare = "".join(c for c in unicodedata.normalize("NFKD", char) if not unicodedata.combining(c)).casefold()
    return "".join(TWINS.get(c, c) for c in bare if c.isalnum())


def squeeze(text: str) -> str:
    """The letters and digits of `text`, folded, end to end."""
    if text.isascii():
        return GAP.sub("", text).lower()
    return "".join(map(fold, text))


class Apart:
    """Finds literals of at least `SHORTEST` letters and digits, whatever stands between their characters."""

    def __init__(self, literals: Iterable[str]) -> None:
        words = {squeeze(plain(text)) for text in literals}
        self._needles = sorted({w for word in words if len(word) >= SHORTEST for w in (word, word[::-1])})

    def spans(self, text: str, frames: Spans = ()) -> Spans:
        """The [start, end) of every run of characters that belongs to a literal, in rising order.

        `frames` are no part of the text's own words (names of fields, marks): a literal is found across them.
        """
        if not self._needles:
            return ()
        squeezed = squeeze(blank(text, frames))
        needles = [needle for needle in self._needles if needle in squeezed]
        return _located(text, needles, frames) if needles else []


def blank(text: str, frames: Spans) -> str:
    """`text` with spaces in the place of `frames`."""
    return replace(text, [(a, b, " " * (b - a)) for a, b in frames]) if frames else text


def _located(text: str, needles: list[str], frames: Spans) -> Spans:
    """Where in `text` the characters of the needles are; slow, and only for texts that are known to hold one."""
    places = [(i, f) for i, char in enumerate(blank(text, frames)) for f in fold(char)]
    squeezed = "".join(f for _, f in places)
    taken: set[int] = set()
    for needle in needles:
        at = squeezed.find(needle)
        while at >= 0:
            inside = [place for place, _ in places[at : at + len(needle)]]
            if _whole(text, inside[0], inside[-1], needle):
                taken.update(inside)
            at = squeezed.find(needle, at + 1)
    return joined(text, [(place, place + 1) for place in sorted(taken)])


def _whole(text: str, first: int, last: int, needle: str) -> bool:
    """Whether a match is not part of a longer word or number; an identifier counts anywhere."""
    if not needle.isalpha() and not needle.isdigit():
        return True
    return not (first and text[first - 1].isalnum()) and not (last + 1 < len(text) and text[last + 1].isalnum())


def joined(text: str, spans: Spans) -> Spans:
    """Neighbours as one, also over up to three characters that are neither letters nor a frame of the text."""
    runs: list[tuple[int, int]] = []
    for start, end in spans:
        gap = text[runs[-1][1] : start] if runs else None
        if gap is not None and len(gap) <= 3 and not FRAME.search(gap):
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def replace(text: str, pieces: Iterable[tuple[int, int, str]]) -> str:
    """`text` with replacements for some spans, in rising order."""
    out, done = list[str](), 0
    for start, end, words in pieces:
        out += [text[done:start], words]
        done = end
    return "".join([*out, text[done:]])


def keys_of(lines: str) -> Spans:
    """Where in lines of JSON the names of fields are."""
    return [match.span() for match in STRING.finditer(lines) if match["key"]]


def union(*spans: Spans) -> Spans:
    """All of them, those that overlap as one."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted(span for several in spans for span in several):
        if runs and start < runs[-1][1]:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        else:
            runs.append((start, end))
    return runs


def unwrap(text: str, judge: Callable[[str, int], str | None]) -> str:
    """Replace each run of base64, hex or character codes for whose content `judge` returns a replacement.

    Its second argument is how many characters a find must have: in rows of ordinary numbers shorter ones are chance.
    """

    def base(match: re.Match[str]) -> str:
        run = match.group()
        if run.islower() or (run.isalpha() and run[1:].islower()):  # a word, or the name of a tool
            return run
        return next((word for content in from_base64(run) if (word := judge(content, 1))), run)

    def sixteen(match: re.Match[str]) -> str:
        digits = re.sub(r"0x|[^0-9a-fA-F]", "", match.group())
        least = LEAST if digits.isdigit() and not match.group().isalnum() else 1
        for start in (0, 1):
            piece = digits[start : start + (len(digits) - start) // 2 * 2]
            content = readable(bytes.fromhex(piece))
            if content and (word := judge(content, least)):
                return word
        return match.group()

    return BASE64.sub(base, HEX.sub(sixteen, unwrap_codes(text, judge)))


def unwrap_codes(text: str, judge: Callable[[str, int], str | None]) -> str:
    """`unwrap` for rows of codes alone: they may lie across the elements of a list."""

    def row(match: re.Match[str]) -> str:
        contents = from_codes(re.findall(CODE, re.sub(r"chr|[uUx]", " ", match.group())))
        return next((word for content in contents if (word := judge(content, LEAST))), match.group())

    return CODES.sub(row, text)


def from_codes(numbers: Sequence[str]) -> Iterator[str]:
    """The texts that a row of numbers may spell, in the bases in which people write them; no code is a space.

    Four codes in a row there must be: dates and times have one now and then.
    """
    for base in (10, 16, 8):
        content = "".join(_code(number, base) for number in numbers)
        if ROW.search(content):
            yield content.replace(NO_CODE, " ")


@lru_cache(maxsize=4096)
def _code(number: str, base: int) -> str:
    try:
        code = int(number, base)
    except ValueError:
        return NO_CODE
    if code in (0, 9, 10, 13):
        return " "
    return chr(code) if 32 <= code < 0xD800 or 0xE000 <= code <= 0x10FFFF else NO_CODE


def from_base64(run: str) -> Iterator[str]:
    """The texts that a run may spell, wherever in it the code begins; all capitals may be base32."""
    if BASE32.fullmatch(run.rstrip("=")):
        letters = run.rstrip("=")
        with contextlib.suppress(binascii.Error):
            yield readable(base64.b32decode(letters + "=" * (-len(letters) % 8)))
    letters = re.sub(r"[=\s]", "", run).translate({ord("-"): "+", ord("_"): "/"})
    for start in range(min(4, len(letters))):
        piece = letters[start:]
        piece = piece[: len(piece) - 1] if len(piece) % 4 == 1 else piece
        try:
            content = readable(base64.b64decode(piece + "=" * (-len(piece) % 4)))
        except (binascii.Error, ValueError):
            continue
        if content:
            yield content


def readable(data: bytes) -> str:
    """The text that bytes are, a few odd ones aside; "" where they are none. Zeros in every other place are UTF-16."""
    encoding = "utf-8"
    if 4 * data.count(0) >= len(data):
        encoding = "utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be"
    text = data.decode(encoding, "ignore").replace("\0", "")
    odd = sum(char not in "\n\t\r" and unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs") for char in text)
    lost = len(data) - data.count(0) - len(text.encode(encoding).replace(b"\0", b""))
    return text if len(text) >= 3 and odd + lost <= 0.1 * len(data) else ""
