"""What leaves is on an allow-list: no encoding of a secret does, whichever it is, and what a writer needs stays."""

from __future__ import annotations

import base64
import binascii
import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import quopri
import string
import zlib
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.properties import examples
from tests.speed import cpu_seconds
from tests.trainer.siblings import ToySuite, call, seen, with_messages
from trainer.data import Message
from trainer.references.ordinary_text import is_ordinary
from trainer.references.sanitiser import MARK, Sanitiser
from trainer.references.writer_prompt import build_prompt

Spell = Callable[[str], str]
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
Z85 = string.digits + string.ascii_lowercase + string.ascii_uppercase + ".-:+=^!/*?&<>()[]{}@%$#"
LOWER = string.ascii_lowercase
MORSE = dict(zip(
    string.ascii_lowercase + string.digits,
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.. "
    "----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----.".split(),
))  # fmt: skip
NATO = dict(zip(
    string.ascii_lowercase + string.digits,
    "alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu zero one two three four five six seven eight nine".split(),
))  # fmt: skip


def number(text: str, digits: str) -> str:
    """The bytes of a text as a number in the base of these digits."""
    value, out = int.from_bytes(text.encode(), "big"), ""
    while value:
        value, last = divmod(value, len(digits))
        out = digits[last] + out
    return out


def shifted(by: int, *alphabets: str) -> Spell:
    tables = {c: a[(i + by) % len(a)] for a in alphabets for i, c in enumerate(a)}
    return lambda t: "".join(tables.get(c, c) for c in t)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pairs(text: str, size: int, gap: str) -> str:
    return gap.join(text[i : i + size] for i in range(0, len(text), size))


def quinary(text: str) -> str:
    """Proquints: 16 bits as five letters that can be pronounced."""
    data = text.encode() + b"\0" * (len(text.encode()) % 2)
    con, vow = "bdfghjklmnprstvz", "aiou"
    halves = [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
    return "-".join(con[h >> 12] + vow[h >> 10 & 3] + con[h >> 6 & 15] + vow[h >> 4 & 3] + con[h & 15] for h in halves)


UPPER = string.ascii_uppercase
ATBASH = {ord(c): block[-1 - i] for block in (LOWER, UPPER, string.digits) for i, c in enumerate(block)}
ENCODINGS: dict[str, Spell] = {
    "as it is": lambda t: t,
    "base64": lambda t: b64(t.encode()),
    "base64 without padding": lambda t: b64(t.encode()).rstrip("="),
    "base64url": lambda t: base64.urlsafe_b64encode(t.encode()).decode(),
    "base64 backwards": lambda t: b64(t.encode())[::-1],
    "base64 in another alphabet": lambda t: b64(t.encode()).swapcase(),
    "base64 in lines": lambda t: pairs(b64(t.encode()), 8, "\n"),
    "base64 in words": lambda t: pairs(b64(t.encode()), 4, " "),
    "base64 of backwards": lambda t: b64(t[::-1].encode()),
    "base64 of UTF-7": lambda t: b64(t.encode("utf-7")),
    "base64 of UTF-32": lambda t: b64(t.encode("utf-32")),
    "base64 five times": lambda t: b64(b64(b64(b64(b64(t.encode()).encode()).encode()).encode()).encode()),
    "gzip, base64": lambda t: b64(gzip.compress(t.encode(), mtime=0)),
    "zlib, base64": lambda t: b64(zlib.compress(t.encode())),
    "bz2, base64": lambda t: b64(bz2.compress(t.encode())),
    "xz, base64": lambda t: b64(lzma.compress(t.encode())),
    "gzip, hex": lambda t: gzip.compress(t.encode(), mtime=0).hex(),
    "gzip, base32": lambda t: base64.b32encode(gzip.compress(t.encode(), mtime=0)).decode(),
    "base32": lambda t: base64.b32encode(t.encode()).decode(),
    "base32 in small letters": lambda t: base64.b32encode(t.encode()).decode().lower(),
    "base32 in groups": lambda t: pairs(base64.b32encode(t.encode()).decode().rstrip("="), 4, "-"),
    "base32hex": lambda t: base64.b32hexencode(t.encode()).decode(),
    "Crockford's base32": lambda t: number(t, "0123456789ABCDEFGHJKMNPQRSTVWXYZ"),
    "z-base-32": lambda t: number(t, "ybndrfg8ejkmcpqxot1uwisza345h769"),
    "base16": lambda t: t.encode().hex(),
    "hex in capitals": lambda t: t.encode().hex().upper(),
    "hex, colons": lambda t: t.encode().hex(":"),
    "hex in fours": lambda t: t.encode().hex(" ", 2),
    "hex backwards": lambda t: t.encode().hex()[::-1],
    "hex of hex": lambda t: t.encode().hex().encode().hex(),
    "hex of its complement": lambda t: bytes(255 - b for b in t.encode()).hex(),
    "hex of xor": lambda t: bytes(b ^ 0x5A for b in t.encode()).hex(),
    "base64 of xor": lambda t: b64(bytes(b ^ 0x5A for b in t.encode())),
    "base36": lambda t: number(t, string.digits + LOWER),
    "base45": lambda t: number(t, string.digits + UPPER + " $%*+-./:"),
    "base58": lambda t: number(t, BASE58),
    "base62": lambda t: number(t, BASE62),
    "base85": lambda t: base64.b85encode(t.encode()).decode(),
    "ascii85": lambda t: base64.a85encode(t.encode()).decode(),
    "adobe85": lambda t: base64.a85encode(t.encode(), adobe=True).decode(),
    "z85": lambda t: number(t, Z85),
    "base91": lambda t: number(t, "".join(map(chr, range(33, 124)))),
    "base26": lambda t: number(t, LOWER),
    "uuencode": lambda t: binascii.b2a_uu(t.encode()).decode().strip(),
    "xxencode": lambda t: number(t, "+-" + BASE62),
    "yenc": lambda t: "".join(chr((b + 42) % 256) for b in t.encode()),
    "quoted-printable": lambda t: "".join(f"={b:02X}" for b in quopri.encodestring(t.encode())),
    "percent": lambda t: "".join(f"%{b:02x}" for b in t.encode()),
    "UTF-7": lambda t: "+" + b64(t.encode("utf-16-be")).rstrip("=") + "-",
    "punycode": lambda t: "xn--" + (t + "\u00fc").encode("punycode").decode(),
    "binary": lambda t: " ".join(f"{b:08b}" for b in t.encode()),
    "binary in one": lambda t: "".join(f"{b:08b}" for b in t.encode()),
    "binary in letters": lambda t: "".join(f"{b:08b}" for b in t.encode()).replace("0", "a").replace("1", "b"),
    "octal": lambda t: " ".join(f"{b:03o}" for b in t.encode()),
    "octal in one": lambda t: "".join(f"{b:03o}" for b in t.encode()),
    "decimal": lambda t: " ".join(str(b) for b in t.encode()),
    "decimal, commas": lambda t: ",".join(str(b) for b in t.encode()),
    "decimal in threes": lambda t: "".join(f"{b:03d}" for b in t.encode()),
    "one number": lambda t: str(int.from_bytes(t.encode(), "big")),
    "one number in groups": lambda t: f"{int.from_bytes(t.encode(), 'big'):,}",
    "codes plus one": lambda t: ", ".join(str(b + 1) for b in t.encode()),
    "places in the alphabet": lambda t: "-".join(str(BASE62.find(c)) for c in t),
    "ternary": lambda t: number(t, "012"),
    "backwards": lambda t: t[::-1],
    "backwards in fours": lambda t: pairs(t[::-1], 4, " "),
    "backwards in fours, hyphens": lambda t: pairs(t[::-1], 4, "-"),
    "pairs swapped": lambda t: "".join(t[i : i + 2][::-1] for i in range(0, len(t), 2)),
    "halves swapped": lambda t: t[len(t) // 2 :] + t[: len(t) // 2],
    "even then odd": lambda t: t[::2] + t[1::2],
    "rail fence": lambda t: t[::3] + t[1::3] + t[2::3],
    "every other letter": lambda t: "x".join(t),
    "doubled": lambda t: "".join(c * 2 for c in t),
    "in pairs": lambda t: pairs(t, 2, " "),
    "in threes": lambda t: pairs(t, 3, "_"),
    "apart": " ".join,
    "apart by slashes": "/".join,
    "rot13": lambda t: codecs.encode(t, "rot13"),
    "rot5": shifted(5, string.digits),
    "rot18": lambda t: codecs.encode(shifted(5, string.digits)(t), "rot13"),
    "rot47": shifted(47, "".join(map(chr, range(33, 127)))),
    "Caesar by 3": shifted(3, LOWER, UPPER, string.digits),
    "Caesar by -1": shifted(-1, LOWER, UPPER, string.digits),
    "Atbash": lambda t: t.translate(ATBASH),
    "Vigenere": lambda t: "".join(shifted(i % 5 * 3 + 4, LOWER, UPPER, string.digits)(c) for i, c in enumerate(t)),
    "case swapped": str.swapcase,
    "leet": lambda t: t.translate(str.maketrans("aeiostAEIOST", "431057431057")),
    "vowels left out": lambda t: "".join(c for c in t if c not in "aeiou"),
    "Pig Latin": lambda t: t[1:] + t[:1] + "ay",
    "Morse": lambda t: " ".join(MORSE.get(c, "?") for c in t.lower()),
    "Morse, slashes": lambda t: "/".join(MORSE.get(c, "?") for c in t.lower()),
    "spelling alphabet": lambda t: " ".join(NATO.get(c, "dash") for c in t.lower()),
    "spelling alphabet, hyphens": lambda t: "-".join(NATO.get(c, "dash") for c in t.lower()),
    "Braille": lambda t: "".join(chr(0x2800 + b % 256) for b in t.encode()),
    "circles": lambda t: "".join(chr(0x24B6 + ord(c.upper()) - 65) if c.isalpha() else c for c in t),
    "Yi syllables": lambda t: "".join(chr(0xA000 + b) for b in t.encode()),
    "rare Chinese": lambda t: "".join(chr(0x3400 + b) for b in t.encode()),
    "emoji": lambda t: "".join(chr(0x1F600 + b % 64) for b in t.encode()),
    "tags": lambda t: "".join(chr(0xE0000 + b) for b in t.encode()) + "x",
    "variation selectors": lambda t: "x" + "".join(chr(0xFE00 + b % 16) + chr(0xE0100 + b // 16) for b in t.encode()),
    "mixed scripts": lambda t: "".join(chr((0x0410, 0x03B1, 0x0561)[i % 3] + ord(c) % 24) for i, c in enumerate(t)),
    "entities": lambda t: "".join(f"&#{ord(c)};" for c in t),
    "double entities": lambda t: "".join(f"&amp;#x{ord(c):x};" for c in t),
    "JSON escapes": lambda t: "".join(f"\\u{ord(c):04x}" for c in t),
    "JSON escapes five deep": lambda t: "".join(f"{chr(92) * 16}u{ord(c):04x}" for c in t),
    "chr": lambda t: "+".join(f"chr({ord(c)})" for c in t),
    "String.fromCharCode": lambda t: f"String.fromCharCode({','.join(str(ord(c)) for c in t)})",
    "a list of letters": lambda t: json.dumps(list(t)),
    "Python bytes": lambda t: repr(bytes(b ^ 0x80 for b in t.encode())),
    "proquints": quinary,
    "a hash": lambda t: hashlib.sha256(t.encode()).hexdigest(),
    "a URL": lambda t: f"https://example.org/?q={b64(t.encode())}",
    "a file name": lambda t: f"report_{number(t, BASE58)}.pdf",
    "a word of camels": lambda t: "show" + number(t, BASE58) + "List",
}  # fmt: skip
SECRETS = {
    "literal": "Q7kZ41xWp9",
    "key": "sk-proj-AbCdEf0123456789xyz",
    "password": "hunter2-Zq9.swordfish",
    "card": "4111111111111111",
    "card of another issuer": "378282246310005",
    "account": "DE89370400440532013000",
}


def sent(*messages: Message, planted: str = "") -> tuple[str, Sanitiser]:
    """What would leave the process, and the sanitiser that let it."""
    cleaner = Sanitiser(ToySuite([planted] if planted else []).literals)
    made = with_messages((list(messages), 1.0), ([], 0.0))
    return build_prompt(made, cleaner, 480_000)[1]["content"], cleaner


@pytest.mark.parametrize("secret", SECRETS)
def test_no_encoding_of_a_secret_leaves_whole(secret: str) -> None:
    """Whether it is known as one or not."""
    assert len(ENCODINGS) >= 84
    text = SECRETS[secret]
    for known in (True, False):
        if not known and secret in ("literal", "password"):
            continue  # what is neither known nor long may leave as it is
        leaked = []
        for way, spell in ENCODINGS.items():
            shown = spell(text)
            frame = f"the note says {shown} today"
            body, _ = sent(
                call("look", {"note": frame}),
                seen(json.dumps({"note": frame, "value": shown})),
                {"role": "assistant", "content": frame},
                planted=text if known else "",
            )
            squeezed = "".join(body.split())
            if json.dumps(shown)[1:-1] in body or shown in body or "".join(shown.split()) in squeezed:
                leaked.append(way)
        assert not leaked


ORDINARY = [
    "The room is free on Monday from 10:30 to 11:45, for 3 of 4 people.",
    "Flight HAT170 departs 2024-05-16 10:30; reservation 4WQ150 costs $1,250.50.",
    "error: missing required argument 'recipient_id' (HTTP 404)",
    "apis.spotify.show_song_library(sort_by=title, page_index=0)",
    "moved final_report.pdf into /home/docs/archive",
    "getAllThings returned 12 items in 0.35 s, 45% more than before -> ok",
    "Zaragoza, Ouagadougou, Marguerite Quentin and McDonald",
    "Donaudampfschiffahrt und Geschwindigkeitsbegrenzung",  # the second is too long for a word
    "R\u00e9servation annul\u00e9e, l'utilisateur n'est pas autoris\u00e9",
    "\u0411\u0440\u043e\u043d\u044c \u043e\u0442\u043c\u0435\u043d\u0435\u043d\u0430",
    "Sofia Gonzalez, address1: 12 Main St, Apt 4",
    "\u9810\u7d04\u306f\u30ad\u30e3\u30f3\u30bb\u30eb\u3055\u308c\u307e\u3057\u305f",
    "it's done -- see step3, item 2a, the 3rd and v2.1; 50km, $5 (5%)",
    '{"ok": true, "n": 3, "names": ["ann", "bob"], "when": "2024-05-20T10:00:00Z"}',
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_what_a_writer_needs_stays(text: str) -> None:
    body, cleaner = sent(seen(text))
    shown = json.dumps(json.loads(text) if text[0] == "{" else text, ensure_ascii=False)
    assert (shown in body) == ("begrenzung" not in text)
    assert cleaner.hits["opaque"] == ("begrenzung" in text)


def test_a_value_can_be_followed() -> None:
    """The same id has the same number wherever it stands, in every sibling, and whenever the prompt is made."""
    one, other = "7e1c9fa03b52", "9b52c1e7fa03"
    bodies = {sent(seen(f"order {one}, {other}"), call("look", {"id": other}), seen(one))[0] for _ in range(2)}
    (body,) = bodies
    assert '"order [masked opaque 1], [masked opaque 2]"' in body
    assert 'call look: {"id": "[masked opaque 2]"}\ntool: "[masked opaque 1]"' in body


def test_names_of_the_tools_schemas_stay() -> None:
    made = with_messages(([call("xkq7zz9pwt", {"qqv_hx_9f8e7d6c": 1})], 1.0), ([], 0.0))
    for one in made.rollouts:
        function = {"name": "xkq7zz9pwt", "parameters": {"properties": {"qqv_hx_9f8e7d6c": {"type": "integer"}}}}
        one.tools = [{"type": "function", "function": function}]
    assert 'call xkq7zz9pwt: {"qqv_hx_9f8e7d6c": 1}' in build_prompt(made, Sanitiser(), 48_000)[1]["content"]


@pytest.mark.parametrize(
    "word", ["in", "ok", "swordfish", "iPhone", "JSONDecoder", "reservations", "Zo\u00eb", "\u732b"]
)
def test_words(word: str) -> None:
    assert is_ordinary(word)


@pytest.mark.parametrize(
    "run",
    [
        "c3dvcmRmaXNo",
        "BOu",
        "fjbeqsvfu",
        "QWxhZGRpbjpvcGVu",
        "p\u0430ss",
        "x" * 30,
        "\u3400\u3401",
        "hxuxnxt",
        "\ua000",
    ],
)
def test_no_words(run: str) -> None:
    assert not is_ordinary(run)


def test_what_is_random_does_not_stay() -> None:
    """Twelve characters and more, of any usual alphabet: of 2,000 at most 20 stay, with 23 marks in it 60."""
    random = Random(0)
    alphabets = [string.ascii_letters, BASE62, BASE58, string.digits + "abcdef", string.ascii_lowercase + string.digits]
    for alphabet in (*alphabets, string.digits, Z85):
        texts = ["".join(random.choices(alphabet, k=random.randint(12, 40))) for _ in range(2_000)]
        shown = [json.dumps(text) for text in texts]
        line = Sanitiser().ordinary(set()).line
        assert sum(line(text) == text for text in shown) <= (60 if alphabet == Z85 else 20)


@given(st.text(max_size=60), st.text(string.printable, max_size=60))
@example("000\r:00:&&", '000"00::&')  # the colon before what is masked is no text of its own
@settings(max_examples=examples(100))
def test_masking_keeps_json_whole_and_is_stable(odd: str, text: str) -> None:
    """Every line is JSON before and after, and what is masked once is not masked again."""
    cleaner = Sanitiser()
    value = json.dumps({"a": odd, "b": [text, odd]}, ensure_ascii=False)
    once = cleaner.ordinary(set()).line(value)
    assert isinstance(json.loads(once), dict)
    assert cleaner.ordinary(set()).line(once) == once
    assert "".join(MARK.split(once)[::2]) in value or MARK.search(once)


@pytest.mark.parametrize(
    "unit", ["a", "1 ", "aB3", "4111 ", "x-", '", "', "\\n", "{", "\u732b", "!?", "2024-", "10:30 ", "AB12 "]
)
def test_no_text_is_slow(unit: str) -> None:
    def clean(text: str) -> None:
        Sanitiser().ordinary(set()).line(text * (100_000 // len(text)))

    assert cpu_seconds(lambda: clean(unit), runs=1) < 20 * cpu_seconds(lambda: clean("The room is free on Monday. "))
