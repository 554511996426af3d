"""Whatever a text spells and however: an attacker who reads the request with tools of his own finds nothing in it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import html
import json
import re
import string
import unicodedata
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.properties import examples
from tests.speed import cpu_seconds
from tests.trainer.siblings import ToySuite, call, group, seen, task, with_messages
from tests.trainer.stub_endpoint import StubEndpoint
from trainer.config import WriterConfig
from trainer.data import Message
from trainer.references import writers
from trainer.references.literals import compile_literals, spans
from trainer.references.payment_cards import luhn
from trainer.references.payment_cards import spans as card_spans
from trainer.references.sanitiser import Sanitiser
from trainer.references.spellings import plain
from trainer.references.writer_prompt import build_prompt

Spell = Callable[[str], str]
# The letters of Cyrillic that are drawn as these are.
TO_CYRILLIC = str.maketrans("aeopcxyAEOPCXTHKMB", "".join(map(chr, (
    0x430, 0x435, 0x43E, 0x440, 0x441, 0x445, 0x443,
    0x410, 0x415, 0x41E, 0x420, 0x421, 0x425, 0x422, 0x41D, 0x41A, 0x41C, 0x412,
))))  # fmt: skip
# Letters of Cherokee and Armenian that are drawn as these are; letters of other shapes.
TO_OTHERS = str.maketrans("ABCDEGHJKLMPRTVWZonuhgq", "".join(map(chr, (
    0x13AA, 0x13F4, 0x13DF, 0x13A0, 0x13AC, 0x13C0, 0x13BB, 0x13AB, 0x13E6, 0x13DE, 0x13B7, 0x13E2, 0x13A1, 0x13A2,
    0x13D9, 0x13D4, 0x13C3, 0x585, 0x578, 0x57D, 0x570, 0x581, 0x566,
))))  # fmt: skip
SMALL_CAPITALS = str.maketrans("abcdeghijklmnopqrtuvwyz", "".join(map(chr, (
    0x1D00, 0x299, 0x1D04, 0x1D05, 0x1D07, 0x262, 0x29C, 0x26A, 0x1D0A, 0x1D0B, 0x29F, 0x1D0D, 0x274, 0x1D0F, 0x1D18,
    0xA7AF, 0x280, 0x1D1B, 0x1D1C, 0x1D20, 0x1D21, 0x28F, 0x1D22,
))))  # fmt: skip


def moved(first: int) -> Spell:
    """Every Latin letter as the one of its place in a block that begins at `first`."""
    return lambda t: "".join(chr(first + ord(c.upper()) - 65) if c.isascii() and c.isalpha() else c for c in t)


WHOLE: dict[str, Spell] = {
    "as it is": lambda t: t,
    "upper": str.upper,
    "lower": str.lower,
    "full width": lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),
    "spaces": " ".join,
    "two spaces": "  ".join,
    "hyphens": "-".join,
    "dots": ".".join,
    "stars": "**".join,
    "lines": "\n".join,
    "zero width": "\u200b".join,
    "word joiner": "\u2060".join,
    "grapheme joiner": "\u034f".join,
    "variation": "\ufe0f".join,
    "soft hyphens": "\u00ad".join,
    "accents": lambda t: "".join(c + "\u0301" for c in t),
    "arabic digits": lambda t: "".join(chr(0x0660 + int(c)) if c in string.digits else c for c in t),
    "twins": lambda t: t.translate(TO_CYRILLIC),
    "backwards": lambda t: t[::-1],
    "JSON": lambda t: json.dumps(t),
    "JSON twice": lambda t: json.dumps(json.dumps(t)),
    "\\u": lambda t: "".join(f"\\u{ord(c):04x}" for c in t),
    "\\\\u": lambda t: "".join(f"\\\\u{ord(c):04X}" for c in t),
    "\\x": lambda t: "".join(f"\\x{ord(c):02x}" if ord(c) < 256 else c for c in t),
    "percent": lambda t: "".join(f"%{b:02x}" for b in t.encode()),
    "percent twice": lambda t: "".join(f"%25{b:02X}" for b in t.encode()),
    "quoted": lambda t: quote(t),
    "entities": lambda t: "".join(f"&#{ord(c)};" for c in t),
    "hex entities": lambda t: "".join(f"&#x{ord(c):x};" for c in t),
    "base64": lambda t: base64.b64encode(t.encode()).decode(),
    "base64 of more": lambda t: base64.b64encode(f"so it is {t}, yes".encode()).decode(),
    "base64 of JSON": lambda t: base64.urlsafe_b64encode(json.dumps({"note": t}).encode()).decode().rstrip("="),
    "base64 twice": lambda t: base64.b64encode(base64.b64encode(t.encode())).decode(),
    "base64 glued": lambda t: "x" + base64.b64encode(t.encode()).decode(),
    "hex": lambda t: t.encode().hex(),
    "hex apart": lambda t: t.encode().hex(" ").upper(),
    "0x": lambda t: " ".join(f"0x{b:02x}" for b in t.encode()),
    "base32": lambda t: base64.b32encode(t.encode()).decode(),
    "UTF-16 in hex": lambda t: t.encode("utf-16-le").hex(),
    "UTF-16 in base64": lambda t: base64.b64encode(t.encode("utf-16-be")).decode(),
    "octal": lambda t: "".join(f"\\{b:03o}" for b in t.encode()),
    "quoted-printable": lambda t: "".join(f"={b:02X}" for b in t.encode()),
    "CSS": lambda t: "".join(f"\\{ord(c):x} " for c in t),
    "codes": lambda t: ", ".join(str(ord(c)) for c in t),
    "chr": lambda t: "+".join(f"chr({ord(c)})" for c in t),
    "small capitals": lambda t: t.lower().translate(SMALL_CAPITALS),
    "black circles": moved(0x1F150),
    "black squares": moved(0x1F170),
    "flags": moved(0x1F1E6),
    "other twins": lambda t: t.translate(TO_OTHERS),
}
BACK = {
    **{other: chr(latin) for latin, other in (*TO_CYRILLIC.items(), *TO_OTHERS.items(), *SMALL_CAPITALS.items())},
    **{first + i: chr(97 + i) for first in (0x1F150, 0x1F170, 0x1F1E6) for i in range(26)},
}
SPLIT: dict[str, Callable[[str], Any]] = {  # into something that JSON holds
    "list": list,
    "halves": lambda t: [t[: len(t) // 2], t[len(t) // 2 :]],
    "fields": lambda t: {"first": t[: len(t) // 2], "second": t[len(t) // 2 :]},
    "keys": lambda t: {t[: len(t) // 2]: None, t[len(t) // 2 :]: None},
    "nested": lambda t: {"a": {"b": t[:2], "c": [t[2:4], {"d": t[4:]}]}},
    "codes": lambda t: [ord(c) for c in t],
    "JSON in a string": lambda t: {"note": json.dumps({"first": t[:3], "second": json.dumps([t[3:]])})},
}

literals = st.one_of(
    st.text(string.ascii_letters + string.digits, min_size=3, max_size=9).map(lambda t: f"Q7{t}"),
    st.from_regex(r"[1-9][0-9]{5,8}", fullmatch=True),
    st.tuples(*[st.sampled_from(["Quentin", "Zaragoza", "Marguerite", "Ouagadougou"])] * 2).map(" ".join),
)


def squeezed(text: str) -> str:
    """Letters and digits alone, without case and accents; the attacker's own."""
    bare = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    latin = "".join(bare).translate(BACK).casefold()
    return "".join(str(unicodedata.decimal(c, c)) for c in latin if c.isalnum())


def readings(body: str) -> list[str]:
    """The request as an attacker may read it: decoded in turn by all he knows, its words, its values, their codes."""
    texts = [body]
    for _ in range(4):
        last = re.sub(r"\\+(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))", lambda m: chr(int(m[1] or m[2], 16)), texts[-1])
        texts.append(html.unescape(unquote(last)))
    for text in list(texts):  # read on from value to value: without our words before each, without names of fields
        bare = re.sub(r"(?m)^(?:TASK |SIBLING \d+ \w+|[a-z_ ]{1,40}: )", "", text)
        texts += [bare, *(re.sub(r'"[^"]*":', " ", each) for each in (text, bare))]
    found = list(texts)
    for _ in range(2):
        for text in list(found):
            for run in re.findall(r"[A-Za-z0-9+/_-]{8,}", text):
                for start in range(4):
                    piece = run[start:].translate({45: "+", 95: "/"})
                    piece = piece[: len(piece) // 4 * 4] if len(piece) % 4 == 1 else piece + "=" * (-len(piece) % 4)
                    found.append(base64.b64decode(piece).decode("utf-8", "ignore"))
            for run in re.findall(r"(?:(?:0x)?[0-9a-fA-F]{2}[ :]?){5,}", text):
                digits = re.sub(r"0x|[ :]", "", run)
                found.append(bytes.fromhex(digits[: len(digits) // 2 * 2]).decode("utf-8", "ignore"))
            for run in re.findall(r"[A-Z2-7]{8,}", text):
                decoded = base64.b32decode(run[: len(run) // 8 * 8])
                found.append(decoded.decode("utf-8", "ignore"))
            for row in re.findall(r"(?:[0-9a-fA-F]{2,4}[\W_]{1,9}(?:chr\()?){4,}[0-9a-fA-F]{2,4}", text):
                for base in (8, 10, 16):
                    with contextlib.suppress(ValueError):
                        codes = [int(number, base) for number in re.findall(r"[0-9a-fA-F]{2,}", row.replace("chr", ""))]
                        found.append("".join(chr(code) for code in codes if code))
        found = list(dict.fromkeys(t for t in found if len(t) >= 5))
    words = [squeezed(text) for text in found]
    return [*words, *(word[::-1] for word in words)]


def sent(planted: list[str], *traces: list[Message], suite: ToySuite | None = None) -> str:
    """What would leave the process."""
    made = with_messages(*[(trace, float(i % 2)) for i, trace in enumerate(traces)])
    messages = build_prompt(made, Sanitiser((suite or ToySuite(planted)).literals), 48_000)
    return str(messages[1]["content"])


@given(literals, st.sampled_from(list(WHOLE)), st.sampled_from(["{}", "it is {}.", "x\n{}\ty", "({})", "={}&"]))
@settings(max_examples=examples(150))
@example("125000", "base64", "{}")
@example("Q7abc", "hex apart", "({})")
def test_no_spelling_of_a_literal_leaves(literal: str, way: str, frame: str) -> None:
    text = frame.replace("{}", WHOLE[way](literal))
    body = sent(
        [literal],
        [call("look", {"note": text}), seen(json.dumps({"note": text})), {"role": "assistant", "content": text}],
        [call("look", json.dumps({"note": text})[:-1]), seen(text), seen(json.dumps(json.dumps([text])))],
    )
    needle = squeezed(literal)
    assert not [reading for reading in readings(body) if needle in reading]
    assert "[masked" in body


@given(literals, st.sampled_from(list(WHOLE)), st.sampled_from(list(WHOLE)))
@settings(max_examples=examples(100))
def test_no_spelling_of_a_spelling_leaves(literal: str, first: str, second: str) -> None:
    text = WHOLE[second](WHOLE[first](literal))
    body = sent([literal], [seen(text)], [{"role": "assistant", "content": f"so {text} then"}])
    needle = squeezed(literal)
    assert not [reading for reading in readings(body) if needle in reading]


@given(literals, st.sampled_from(list(SPLIT)))
@settings(max_examples=examples(60))
def test_no_literal_leaves_in_pieces(literal: str, way: str) -> None:
    pieces = SPLIT[way](literal)
    body = sent(
        [literal], [seen(json.dumps(pieces)), call("look", pieces if isinstance(pieces, dict) else {"l": pieces})], []
    )
    needle = squeezed(literal)
    assert not [reading for reading in readings(body) if needle in reading]


@given(literals, st.integers(1, 5))
@settings(max_examples=examples(40))
def test_no_literal_leaves_in_two_messages(literal: str, at: int) -> None:
    body = sent([literal], [seen(f"first {literal[:at]}"), seen(f"{literal[at:]} last")], [])
    assert not [reading for reading in readings(body) if squeezed(literal) in reading]


@given(literals, st.integers(1, 5))
@settings(max_examples=examples(40))
def test_no_literal_leaves_in_a_made_up_name(literal: str, at: int) -> None:
    """A name is the frame's word only if it is an offered tool's: any other is the policy's own, wherever it stands."""
    first, second = literal[:at], literal[at:]
    record = json.dumps({"name": first, "arguments": {"a": second}})
    role: Message = {"role": first, "content": second}
    for trace in ([call(first, {"a": second})], [seen(first), call(second)], [seen(record)], [role]):
        body = sent([literal], trace, [call("look"), {"role": "assistant", "content": "done"}])
        assert not [reading for reading in readings(body) if squeezed(literal) in reading]


@pytest.mark.parametrize(
    ("literal", "spellings"),
    [
        ("12500", ["12,500", "12.500,00", "12 500", "12.5k", "12.5 K", "1.25e4", "12500.00", "0.0125 million"]),
        ("$1,250", ["1250", "1,250.00", "1.25k"]),
        ("16280.0", ["16279.999999999998", "16,280", "1.628e4"]),
        ("-1628", ["1628", "-1,628.00"]),
        ("2024-05-20", ["20/05/2024", "05/20/2024", "5/20/2024", "20.05.2024", "20240520", "2024-05-20T10:00:00Z",
                        "May 20, 2024", "20 May 2024", "the 20th of May 2024", "20-may-2024", "MAY 20th 2024"]),
        ("September 3, 2024", ["2024-09-03", "3 Sept. 2024".replace("Sept", "Sep"), "09/03/2024"]),
    ],
)  # fmt: skip
def test_a_number_and_a_date_are_found_by_their_value(literal: str, spellings: list[str]) -> None:
    for text in spellings:
        body = sent([literal], [seen(f"it is {text}."), call("look", {"x": text}), seen(json.dumps([text, 7]))], [])
        assert text not in body, text
        assert body.count("[masked answer]") >= 3


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("12500", "12.5 kg, 125001, 1.25e5, 12501, 912500, 12.5, a12500b"),
        ("2024-05-20", "2024-05-21, 20/06/2024, May 2024, 20 May 2023, 120/05/2024; May 20"),
        ("3", "13, 30, 3rd, 3000, 3k, v3"),
    ],
)
def test_other_numbers_and_dates_stay(literal: str, text: str) -> None:
    assert Sanitiser([literal]).text(text) == text


TEXTS = st.text(string.printable + "\u0131\u017f\u212a\u00e9\u00df", max_size=12)


@given(st.lists(st.one_of(literals, TEXTS), max_size=6), st.data())
@settings(max_examples=examples(200))
def test_the_quick_look_for_literals_loses_none(planted: list[str], data: st.DataObject) -> None:
    """What the pattern of all literals finds is found with the pattern of those alone that a text may have."""
    ways = st.sampled_from([str.upper, str.lower, str.swapcase, json.dumps, quote, html.escape, lambda t: t])
    parts = [data.draw(ways)(data.draw(st.sampled_from(planted or [""]))) for _ in range(3)]
    text = data.draw(st.sampled_from(["", " ", "_", "x", "\\n", "%20", "\\u0131"])).join(parts)
    whole = tuple(sorted({t.strip() for t in planted if t.strip()}))
    found = spans(text, planted)
    for match in compile_literals(whole).finditer(text) if whole else ():
        assert any(start <= match.start() and match.end() <= end for start, end in found)


def test_many_literals_are_not_slow() -> None:
    random = Random(0)
    words = ["".join(random.choices(string.ascii_lowercase, k=random.randint(3, 9))) for _ in range(2_000)]
    text = " ".join(random.choices(words, k=10_000))
    literals = [" ".join(random.sample(words, 2)) for _ in range(1_000)]
    one, many = (cpu_seconds(lambda n=n: Sanitiser(literals[:n]).text(text)) for n in (1, 1_000))
    assert many < 10 * one


CARDS = ["4111111111111111", "5500000000000004", "378282246310005", "6011000990139424"]
GROUPINGS: dict[str, Spell] = {
    **{f"fours, {name}": lambda t, gap=gap: gap.join(re.findall(r"\d{1,4}", t)) for name, gap in {
        "space": " ", "spaces": "   ", "hyphen": "-", "dash": "\u2013", "dot": ".", "underscore": "_", "slash": "/",
        "line": "\n", "no-break": "\u00a0", "percent": "%20", "list": '", "',
    }.items()},
    "with a code behind it": lambda t: f"{t} 123",
    "in a word": lambda t: f"card{t}x",
    "as a measurement": lambda t: f"{t[0]}.{t[1:]}e{len(t) - 1}",
}  # fmt: skip


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("way", [*WHOLE, *GROUPINGS])
def test_no_spelling_of_a_card_leaves(card: str, way: str) -> None:
    text = {**WHOLE, **GROUPINGS}[way](card)
    if way in ("backwards", "twins"):  # the first is another number, and the second has no digits
        return
    body = sent([], [seen(f"pay with {text}"), call("pay", {"with": text})], [])
    assert not [reading for reading in readings(body) if card in reading]


@pytest.mark.parametrize("way", SPLIT)
def test_no_card_leaves_in_fields(way: str) -> None:
    for card in (CARDS[0], CARDS[1]):
        pieces: Any = re.findall(r"\d{4}", card) if way != "list" else list(card)
        if way in ("fields", "nested", "JSON in a string"):
            pieces = {f"part{i}": piece for i, piece in enumerate(pieces)}
        body = sent(
            [],
            [
                seen(json.dumps({"card_digits": pieces})),
                seen(json.dumps([int(p) for p in re.findall(r"\d{4}", "4012888888881881")])),
            ],
            [],
        )
        assert not [reading for reading in readings(body) if card in reading or "4012888888881881" in reading]


CREDENTIALS = """\
password => {}|passwd {}|--password {}|{"name": "password", "value": "{}"}|["password", "{}"]|password\\n{}
| password | {} |
password\t{}|the password for my account is {}|{"pass\u200bword": "{}"}|passwor\\u0064: {}|"password": "a\\"{}" }
Password ({})|password -> {}|pass\u00adword: {}|PASSWORD={}|password:\\n  {}|password = ['{}']|password: the {}
login(user="a", pwd="{}")|<password>{}</password>|curl -u ann:{} https://x|secret_key={}|recovery code: {}
the api key was {}|{"auth": {"scheme": "x", "token": "{}"}}|pw: {}|[{"field": "PIN", "data": "{}"}]
{'password': '{}'}"""


@pytest.mark.parametrize(
    "line", [form for row in CREDENTIALS.splitlines() for form in (row.split("|") if row[0] != "|" else [row])]
)
@pytest.mark.parametrize("way", ["as it is", "full width", "percent", "base64", "hex", "entities"])
def test_no_form_of_a_credential_leaves(line: str, way: str) -> None:
    secret = "hunter2Zq9"
    text = line.replace("\\n", "\n").replace("{}", secret)
    if way != "as it is":
        text = WHOLE[way](text)
    body = sent([], [seen(text), call("look", {"code": text}), {"role": "assistant", "content": text}], [])
    assert not [reading for reading in readings(body) if squeezed(secret) in reading]


def test_keys_of_this_process_do_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "pq81kd-xx29-unseen")
    body = sent([], [seen("x pq81kd-xx29-unseen y"), seen("PQ81KD XX29 UNSEEN")], [])
    assert "unseen" not in body.lower()


@pytest.mark.parametrize(
    "text",
    [
        "the comparison of Paris", "12, 5, 0, 0 and 9", "a table: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
        "CamelCaseName getAllThings deadbeef cafe 20240501", "order 4111111111111112", "3.14159265358979e10",
        "https://example.org/a%20b", "AT&T; a < b && c > d", "2024-05-01 09:30:00.123456 1714550000000",
    ],
)  # fmt: skip
def test_what_only_looks_alike_stays(text: str) -> None:
    cleaner = Sanitiser(["caparison", "125001", "Parish"])
    assert cleaner.text(text) == plain(text)
    assert not cleaner.hits


def test_what_is_packed_too_often_is_masked_unread() -> None:
    text = "nothing to hide in here"
    for depth in range(1, 7):
        text = base64.b64encode(text.encode()).decode()
        assert (Sanitiser().text(text) == "[masked secret]") == (depth > 3)


def test_a_literal_inside_a_word_is_no_literal() -> None:
    assert Sanitiser(["paris"]).text("comparison") == "comparison"
    assert Sanitiser(["paris"]).text("com p a r i s on") == "com [masked answer] on"


def test_cards_are_found_by_issuer_and_checksum() -> None:
    assert all(luhn(card) and card_spans(f"x {card} y") == [(2, 2 + len(card))] for card in CARDS)
    assert card_spans("1111111111111117") == [], "no issuer's number begins so"
    assert card_spans("4, 8, 15, 16, 23, 42, 4, 8, 15, 16") == []


UNITS = [
    "%41",
    "\\u0041",
    "&#65;",
    "QUJD",
    "41 ",
    "4 ",
    "4111 ",
    "a-",
    '"a": ',
    "\\\\",
    "password ",
    "Q7x ",
    "\u200b",
    "é",
    "0x41,",
    "123,",
    "chr(65)+",
    "1e",
    "May 2024 ",
    "2024-",
    "AB2",
    "%2541",
]


@pytest.mark.parametrize("unit", UNITS)
def test_no_spelling_is_slow(unit: str) -> None:
    """Beside prose of that length: the slowest takes 40 times as long, one that is quadratic thousands."""
    cleaner = Sanitiser(["Paris", '"q"x', "12500", "Q7xQ7y"])

    def clean(text: str) -> None:
        cleaner.text(text * (50_000 // len(text)))
        cleaner.lines([text * 250] * (200 // len(text)))

    assert cpu_seconds(lambda: clean(unit), runs=1) < 200 * cpu_seconds(lambda: clean("The room is free on Monday. "))


def test_over_the_wire(tmp_path: Path) -> None:
    """Every spelling at once through the writer itself: not one is in the bytes that the endpoint received."""
    literal, card = "Q7kZ41x", CARDS[0]
    traces: list[tuple[list[Message], float]] = []
    for i, (way, spell) in enumerate(WHOLE.items()):
        text = f"{spell(literal)} and {spell(card) if way != 'backwards' else card}"  # backwards it is another number
        traces.append(([call("look", {"note": text}), seen(json.dumps({"note": text}))], float(i % 2)))
    made = with_messages(*traces, of=task(instruction=f"find {WHOLE['full width'](literal)}"))
    with StubEndpoint() as stub:
        config = WriterConfig(name="openai", base_url=stub.base_url, cache_dir=tmp_path, max_retries=0)
        asyncio.run(writers.load(config, ToySuite([literal])).write([made, group((["look"], 1.0))]))
        (body,) = stub.bodies
    content = json.loads(body)["messages"][1]["content"]
    assert not [r for r in readings(content) if squeezed(literal) in r or card in r]
    assert made.reference_info["sanitiser_hits"]["answer"] >= len(WHOLE)
