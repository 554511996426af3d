"""The sanitiser: masks everything in a trace that a writer must not read, so that nothing secret leaves the process.

Masked are answer-bearing literals, credentials, payment and account values, e-mail addresses, and output of an
evaluator or oracle (reports, gold actions, expected states). Only known fields of a message are passed on, so a field
that an environment adds for itself never leaves. Over-masking costs the writer some context, under-masking invalidates
the experiment, so every rule prefers to mask too much.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from trainer.references import payment_cards
from trainer.references.literals import Literals
from trainer.references.ordinary_text import OrdinaryText
from trainer.references.payment_cards import luhn
from trainer.references.secret_values import own_secrets, telling
from trainer.references.spellings import (
    Apart,
    Spans,
    blank,
    joined,
    keys_of,
    plain,
    replace,
    union,
    unwrap,
    unwrap_codes,
)

MAX_DEPTH = 16  # of nested JSON; deeper is masked whole

# Every pattern must run in linear time, because traces may be arbitrarily long. So repetitions are bounded, or start
# only at the start of a run.
EVALUATOR_KEY = re.compile(
    r"(?i)(?:ground_?truth|gold(?:en)?(?:_|$)|oracle|evaluat|verifier|verdict|hidden_|expected_(?:action|answer|output"
    r"|result|state|value)|(?:reference|true)_(?:solution|answer|label)|test_(?:report|result)|unit_?test|reward$|is_correct)"
)
CREDENTIAL_WORD = (
    r"(?:pass(?:word|wd|phrase|code)|pwd|secret(?!ar[iy]|iv|ion|ly)|credential|api[ _-]?key"
    r"|(?:access|private)[ _-]?key|token(?!s|i[sz])|authori[sz]ation|cookie(?!s)|session[ _-]?id"
    r"|(?:recovery|verification|security|access|backup)[ _-]?code"
    r"|(?:one[ -]?time|2fa|mfa|two[ -]factor|log[ -]?in)[ _-]?(?:code|pin)|passwort|mot de passe"
    r"|(?<![a-z])(?:auth|otp|pin|cvv|cvc|pass|pw)(?![a-z]))"
)
CREDENTIAL_KEY = re.compile(rf"(?i){CREDENTIAL_WORD}")
ACCOUNT_WORD = (
    r"(?:card[ _-]?(?:number|no\b)|(?<![a-z])(?:iban|bic|swift|ssn|balance|account)(?![a-z])|sort[ _-]?code"
    r"|routing[ _-]?(?:number|no\b)|account[ _-]?(?:id|number|no\b|key)|payment[ _-]?(?:id|method))"
)
ACCOUNT_KEY = re.compile(rf"(?i){ACCOUNT_WORD}")

# Between a credential's name and its value: `password: x`, `the password for my account is x`, a row of a table or of a
# list, an element, the next line, `--password x`; and after a mere space what has a digit in it.
GIVEN = (
    r"[\w-]{0,24}(?:\[\])?(?:\\{0,8}[\"'])?(?P<words>(?:\s{1,8}\w{1,24}){0,4}?)\s{0,8}"
    r"(?:[:=]{1,3}>?|[-=]>|[|>(\t\n]|,(?=\s{0,8}\\{0,8}[\"'])|\b(?:is|are|was)\b|(?P<bare>(?<=\s)(?=[^\s\d]{0,40}\d)))"
    r"[\s\[({<]{0,8}"
)
VALUE = r"(?:(?P<quote>\\{0,8}[\"'])(?:(?!(?<!\\)(?P=quote))[^\n]){0,2000}(?P=quote)?|[^\n,;&}\])\"'<|]{1,400})"
IS_KEY = re.compile(r"\s{0,8}[:=]")
OF_ANOTHER = re.compile(r"\S{1,200}\s{1,8}(?:is|are|was|were|[:=]{1,2})\s{1,8}")  # the password of ann77 `is` x

SECRET_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]{0,24}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,24}PRIVATE KEY-----|$)"
    r"|\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}|\bgh[oprsu]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{12,}|\bxox[abeoprs]-[A-Za-z0-9-]{8,}|\bhf_[A-Za-z0-9]{16,}|\bAIza[\w-]{20,}"
    r"|\bglpat-[\w-]{16,}|\bnpm_[A-Za-z0-9]{16,}|\bdo[opr]_v1_[a-f0-9]{16,}|\bya29\.[\w-]{8,}|\bSG\.[\w-]{8,}\.[\w-]{8,}"
    r"|\beyJ[\w-]{8,4000}\.[\w-]{8,4000}(?:\.[\w-]*)?"
    r"|(?i:\b(?:bearer|basic)\s{1,8})(?=[A-Za-z._~+/-]{0,400}(?:[\d=]|(?<=[a-z])[A-Z]|(?<=[A-Z]{2})[a-z])|[\w.~+/-]{32})"
    r"[A-Za-z0-9._~+/=-]{6,}"
    r"|(?<=://)[^/\s:@\"']{1,200}:[^/\s@\"']{1,200}(?=@)"
    r"|(?<=\s)(?:-u|--user)[ =]{1,4}[^\s:]{1,200}:\S{1,400}"
)
CREDENTIALS = re.compile(rf"(?i)(?P<key>{CREDENTIAL_WORD}{GIVEN})(?P<value>{VALUE})")
ACCOUNTS = re.compile(rf"(?i)(?P<key>{ACCOUNT_WORD}{GIVEN})(?P<value>{VALUE})")
ACCOUNT_SHAPES = re.compile(
    r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?\b"
    r"|\b(?:acct|account|card|credit_card|gift_card|certificate|paypal|iban|pm|cus|ba)_\w*\d\w*\b"
    r"|(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])|(?i:\brouting\b[^\d\n]{0,20}\d{9}\b)"
    r"|(?i:\b(?:account|acct|a/c)\.?\s{0,3}(?:no\.?|number|id|#)?\s{0,3}[:#]?\s{0,3}\d[\d -]{4,40}\d)"
)
DIGITS = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?!\d)")
MAX_TOLD = 400  # strings that one group may show as credentials and accounts
MAX_DECODED = 3  # encodings within encodings; deeper is masked whole
NAMES, VALUES = (
    ("name", "key", "field", "label", "type", "title", "attribute"),
    ("value", "val", "content", "data", "text"),
)
EMAILS = re.compile(r"(?<![\w.+%-])[\w.+%-]+@[\w-]+(?:\.[\w-]+)+")
REPORTER = r"(?:evaluat(?:or|ion)|oracle|verifier|grader|unit[ _-]?test|hidden[ _-]?test|test[ _-]suite)"
REPORT = r"(?:report|result|verdict|output|feedback|says?|log)"
EVALUATOR_BLOCKS = re.compile(  # a marked element, or a headline with the lines that follow it up to an empty one
    rf"(?i)<(?P<tag>{REPORTER}[\w-]{{0,40}}|ground_truth|gold\w{{0,40}})\b[^>]{{0,200}}>[\s\S]*?(?:</(?P=tag)>|$)"
    rf"|(?m:^[^\n]*\b{REPORTER}s?[ _-]?{REPORT}s?\b(?:[^\n]*\n(?=\S))*[^\n]*$)"
)
EVALUATOR_LINES = re.compile(
    r"(?im)(?:\b(?:ground[ _-]?truth|gold(?:en)?[ _-](?:action|answer|call|label|patch|solution|state)s?"
    r"|expected[ _-](?:action|answer|output|result|state|value)s?|hidden[ _-](?:label|test|state)s?"
    r"|(?:reference|true)[ _-](?:solution|answer|label)s?)\b"
    r"|\b(?:oracle|evaluator|verifier|verdict|reward|is_correct)\b\s{0,8}\\{0,8}[\"']?\s{0,8}[:=])[^\n]*"
)


ROLES = ("system", "developer", "user", "assistant", "tool", "function")
KINDS = r"(?:answer|secret|credential|payment|account|email|evaluator|opaque \d{1,9})"
MARK = re.compile(rf"(\[masked {KINDS}\])")
MASKED = re.compile(rf"\[?masked {KINDS}\]?")


def mask(kind: str) -> str:
    return f"[masked {kind}]"


class TooMany(Exception):
    """A group with more credentials than can be looked for in every text."""


class Sanitiser:
    """Masks texts and messages of one task and counts what it masked, by kind."""

    def __init__(self, literals: Iterable[str] = (), *, secrets: Iterable[str] = (), emails: bool = True) -> None:
        self.hits: Counter[str] = Counter()
        self.emails = emails
        self._done: dict[tuple[str, int], tuple[str, Counter[str]]] = {}
        self._told: dict[str, set[str]] = {"credential": set(), "account": set()}
        self._known: dict[str, Literals] = {}
        self._apart: dict[str, Apart] = {}
        self._know("secret", [*secrets, *own_secrets(CREDENTIAL_KEY)])
        self._know("answer", list(literals))

    def _know(self, kind: str, strings: Collection[str]) -> None:
        self._known[kind], self._apart[kind] = Literals(map(plain, strings)), Apart(strings)

    def learn(self) -> bool:
        """Mask values that were found by their names wherever they occur; return whether a second pass is worthwhile.

        A trace may show `"password": "n0t-a-secret"` once, and then n0t-a-secret alone in other places.

        Raises:
            TooMany: searching for so many takes too long, and a text that cannot be cleaned must not leave.
        """
        if not any(self._told.values()):
            return False
        if sum(map(len, self._told.values())) > MAX_TOLD:
            raise TooMany
        for kind, strings in self._told.items():
            self._know(kind, strings)
        self._done.clear()
        self.hits.clear()
        return True

    def text(self, text: str, depth: int = 0) -> str:
        """Mask one text, found inside `depth` encodings."""
        key = text, depth
        if key not in self._done:  # siblings read the same observations again and again
            before = self.hits.copy()
            masked = self._masked(text, depth)
            self._done[key] = masked, self.hits - before
        else:
            self.hits += self._done[key][1]
        return self._done[key][0]

    def _masked(self, text: str, depth: int) -> str:
        text = unwrap(plain(text), lambda content, least: self._judge(content, depth, least))
        text = self._whole(text, ("secret",))
        text = self._sub(SECRET_SHAPES, "secret", text, lambda m: self._tell("credential", m.group()))
        text = self._sub(EVALUATOR_BLOCKS, "evaluator", text)
        text = self._sub(EVALUATOR_LINES, "evaluator", text)
        text = self._values(CREDENTIALS, "credential", text)
        text = self._sub(DIGITS, "payment", text, lambda m: luhn(re.sub(r"\D", "", m.group())))
        text = self._sub(ACCOUNT_SHAPES, "account", text, lambda m: self._tell("account", m.group()))
        text = self._values(ACCOUNTS, "account", text)
        if self.emails:
            text = self._sub(EMAILS, "email", text)
        text = self._whole(text, self._known)
        return self._spelled(text, ())

    def ordinary(self, known: Collection[str]) -> OrdinaryText:
        """The allow-list that masked values pass last; `known` stays whatever it is."""

        def masked(number: int) -> str:
            self.hits["opaque"] += 1
            return mask(f"opaque {number}")

        return OrdinaryText(known, masked, MARK)

    def lines(self, lines: Sequence[str]) -> list[str]:
        """The last pass over masked values, one per line, JSON or prose: known strings and cards that lie across them.

        Escapes stay, for they hold the lines together; what they hide was masked before they were made.
        """
        lines = [unwrap_codes(line, lambda content, least: self._judge(content, 0, least)) for line in lines]
        text = "\n".join(self._whole(line, self._known) for line in lines)
        text = self._spelled(text, ())
        return self._spelled(text, keys_of(text)).split("\n")

    def _whole(self, text: str, kinds: Iterable[str]) -> str:
        """Mask known strings in one piece, but not inside our own marks, where an answer may be "email"."""
        for kind in kinds:
            parts = MARK.split(text)
            text = "".join(part if i % 2 else self._known_in(part, kind) for i, part in enumerate(parts))
        return text

    def _known_in(self, text: str, kind: str) -> str:
        spans = self._known[kind].spans(text)
        return replace(text, [(start, end, self._hit(kind)) for start, end in spans]) if spans else text

    def _tell(self, kind: str, value: Any, *, whole: bool = False, alone: bool = True) -> bool:
        """Record a masked value, for `learn`."""
        self._told[kind].update(telling(kind, value, whole=whole, alone=alone))
        return True

    def _judge(self, content: str, depth: int, least: int) -> str | None:
        """A mask for an encoded text of whose characters at least so many are to be masked."""
        if depth >= MAX_DECODED:
            return self._hit("secret")
        before = self.hits.copy()
        kept = MARK.split(self.text(content, depth + 1))[::2]
        if self.hits == before:
            return None
        if len(plain(content)) - sum(map(len, kept)) < least:
            self.hits = before
            return None
        return mask(next(reversed(self.hits)))

    def _spelled(self, text: str, frames: Spans) -> str:
        """Mask cards, and known strings in pieces, backwards, or across `frames` and marks."""
        frames = union(frames, [match.span() for match in MARK.finditer(text)])
        found = {kind: apart.spans(text, frames) for kind, apart in self._apart.items()}
        found["payment"] = joined(text, payment_cards.spans(blank(text, frames)))
        marks = sorted((*span, kind) for kind, spans in found.items() for span in spans)
        pieces, done = list[tuple[int, int, str]](), 0
        for start, end, kind in marks:
            if end > done:
                pieces.append((max(start, done), end, self._hit(kind)))
                done = end
        return replace(text, pieces)

    def json(self, value: Any, depth: int = 0) -> Any:
        """Mask inside parsed JSON: keys that name something secret lose their value, every leaf is masked as text."""
        if depth > MAX_DEPTH:
            return self._hit("evaluator")
        if isinstance(value, Mapping):
            named = kind_of_name(value)
            return {self.text(str(k)): self._field(str(k), v, depth, named) for k, v in value.items()}
        if isinstance(value, list | tuple):
            names = ["", *map(name_in, value)]
            return [self._field(str(name), item, depth, whole=False) for name, item in zip(names, value)]
        if isinstance(value, str):
            return self.content(value, depth + 1)
        shown = json.dumps(value, default=str)
        masked = self.text(shown)
        return value if masked == shown else masked

    def content(self, text: str, depth: int = 0) -> Any:
        """Mask a text that may be JSON: where it parses, by its structure, else as text."""
        for spelled in (text, plain(text)):
            if spelled.lstrip()[:1] in ("{", "[", '"'):
                try:
                    return self.json(json.loads(spelled), depth)
                except (ValueError, RecursionError):
                    continue
        return self.text(text)

    def message(self, message: Mapping[str, Any], tools: Collection[str] = ()) -> dict[str, Any]:
        """The visible part of one chat message, masked: role, content, and the calls it makes.

        Roles and the names of `tools` stay: they stand in every trace, so that a hole would say more than the word.
        """
        record: dict[str, Any] = {"role": self._name(message.get("role"), ROLES)}
        if content := message.get("content"):
            record["content"] = self.content(content) if isinstance(content, str) else self.json(content)
        functions = [(call or {}).get("function") or {} for call in message.get("tool_calls") or []]
        calls = [{"name": self._name(f.get("name"), tools), "arguments": self._arguments(f)} for f in functions]
        return {**record, "calls": calls} if calls else record

    def _name(self, name: Any, frame: Collection[str]) -> str:
        return name if isinstance(name, str) and name in frame else self.text(str(name))

    def _arguments(self, function: Mapping[str, Any]) -> Any:
        arguments = function.get("arguments")
        return self.content(arguments) if isinstance(arguments, str) else self.json(arguments)

    def _field(self, key: str, value: Any, depth: int, named: str | None = None, *, whole: bool = True) -> Any:
        key = plain(key)
        kind = kind_of_key(key) or (named if key.lower() in VALUES else None)
        if kind and value not in (None, "", [], {}):
            if kind in self._told:
                self._tell(kind, value, whole=whole)
            return self._hit(kind)
        return self.json(value, depth + 1)

    def _hit(self, kind: str) -> str:
        self.hits[kind] += 1
        return mask(kind)

    def _sub(
        self,
        finder: re.Pattern[str],
        kind: str,
        text: str,
        accept: Callable[[re.Match[str]], bool] = lambda match: True,
    ) -> str:
        return finder.sub(lambda match: self._hit(kind) if accept(match) else match.group(), text)

    def _values(self, finder: re.Pattern[str], kind: str, text: str) -> str:
        """Mask the value of `key = value`, unless it is masked already, and leave the key."""

        def masked(match: re.Match[str]) -> str:
            if MASKED.fullmatch(match["value"]):
                return match.group()
            if match["quote"] is None:
                self._tell(kind, first_word(kind, match), alone=len(match["value"].split()) == 1)
            elif not is_key(match):
                self._tell(kind, match["value"], whole=match["key"].rstrip()[-1] not in "({[,")
            return match["key"] + self._hit(kind)

        return finder.sub(masked, text)


def is_key(match: re.Match[str]) -> bool:
    """Whether a credential's name is followed by another name, not by a value: passwords = {"spotify": ...}."""
    key = match["key"].rstrip(" ")
    inside = key[-1] == "\n" or key.rstrip()[-1] in "({[,"
    return inside and IS_KEY.match(match.string, match.end()) is not None


def first_word(kind: str, match: re.Match[str]) -> str:
    """The one word of an unquoted value that is the value; the rest of the sentence follows it."""
    value = match["value"]
    if match["bare"] is not None and match["words"]:  # the payment method for reservation 4WQ150
        another = OF_ANOTHER.match(value)
        value = value[another.end() :] if another else "" if kind == "account" else value
    words = value.split()
    return " ".join(words[: 2 if words and words[0].isalpha() and match["bare"] is None else 1])  # Token x, the x


def name_in(item: Any) -> str:
    """A list element that may name the next one: ["password", "hunter2"]."""
    return item if isinstance(item, str) and len(item) <= 32 and len(item.split()) <= 3 else ""


def kind_of_name(record: Mapping[Any, Any]) -> str | None:
    """What {"name": "password", "value": ...} says about its value."""
    names = (str(value) for key, value in record.items() if str(key).lower() in NAMES)
    return next((kind for name in names if name_in(name) and (kind := kind_of_key(plain(name)))), None)


def kind_of_key(key: str) -> str | None:
    """The kind of value that a JSON key names."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    if EVALUATOR_KEY.match(spaced):
        return "evaluator"
    if CREDENTIAL_KEY.search(key) or CREDENTIAL_KEY.search(spaced):
        return "credential"
    return "account" if ACCOUNT_KEY.search(key) or ACCOUNT_KEY.search(spaced) else None
