"""Nothing secret leaves the process: what a writer may read of a trace.

Masked: answer-bearing literals, credentials, payment and account values, e-mail addresses, and whatever an evaluator
or oracle left in a trace (reports, gold actions, expected states). Only known fields of a message are looked at, so a
field that an environment adds for itself never leaves. Over-masking costs the writer some context; under-masking costs
the experiment, so every rule leans to the first.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trainer.credit.literals import pattern

MAX_DEPTH = 16  # of nested JSON; deeper is masked whole

# No rule may take more than linear time: a trace is as long as a policy and an environment make it. So a repetition is
# bounded, or starts only where a run starts.
EVALUATOR_KEY = re.compile(
    r"(?i)(?:ground_?truth|gold(?:en)?(?:_|$)|oracle|evaluat|verifier|verdict|hidden_|expected_(?:action|answer|output"
    r"|result|state|value)|(?:reference|true)_(?:solution|answer|label)|test_(?:report|result)|unit_?test|reward$|is_correct)"
)
CREDENTIAL_WORD = (
    r"(?:pass(?:word|wd|phrase|code)|pwd|secret|credential|api[ _-]?key|(?:access|private)[ _-]?key|token(?!s)"
    r"|authori[sz]ation|cookie|session[ _-]?id|(?<![a-z])(?:auth|otp|pin|cvv|cvc|pass)(?![a-z]))"
)
CREDENTIAL_KEY = re.compile(rf"(?i){CREDENTIAL_WORD}")
ACCOUNT_WORD = (
    r"(?:card[ _-]?(?:number|no\b)|(?<![a-z])(?:iban|bic|swift|ssn|balance|account)(?![a-z])|sort[ _-]?code"
    r"|routing[ _-]?(?:number|no\b)|account[ _-]?(?:id|number|no\b|key)|payment[ _-]?(?:id|method))"
)
ACCOUNT_KEY = re.compile(rf"(?i){ACCOUNT_WORD}")

GIVEN = r"[\w-]{0,24}(?:\\{0,8}[\"'])?\s{0,8}(?:[:=]|\bis\b|\bare\b)\s{0,8}"
VALUE = r"(?:\\{0,8}\"[^\"\\\n]*\\{0,8}\"|\\{0,8}'[^'\\\n]*\\{0,8}'|[^\s,;&}\])\"']+)"

SECRET_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]{0,24}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,24}PRIVATE KEY-----|$)"
    r"|\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}|\bgh[oprsu]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{12,}|\bxox[abeoprs]-[A-Za-z0-9-]{8,}|\bhf_[A-Za-z0-9]{16,}|\bAIza[\w-]{20,}"
    r"|\beyJ[\w-]{8,4000}\.[\w-]{8,4000}(?:\.[\w-]*)?"
    r"|(?i:\b(?:bearer|basic)\s{1,8}[A-Za-z0-9._~+/=-]{6,})"
    r"|(?<=://)[^/\s:@\"']{1,200}:[^/\s@\"']{1,200}(?=@)"
)
CREDENTIALS = re.compile(rf"(?i)(?P<key>{CREDENTIAL_WORD}{GIVEN})(?P<value>{VALUE})")
ACCOUNTS = re.compile(rf"(?i)(?P<key>{ACCOUNT_WORD}{GIVEN})(?P<value>{VALUE})")
ACCOUNT_SHAPES = re.compile(
    r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?\b"
    r"|\b(?:acct|account|card|credit_card|gift_card|certificate|paypal|iban|pm|cus|ba)_\w*\d\w*\b"
    r"|(?i:\b(?:account|acct|a/c)\.?\s{0,3}(?:no\.?|number|id|#)?\s{0,3}[:#]?\s{0,3}\d[\d -]{4,40}\d)"
)
DIGITS = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?!\d)")
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
INVISIBLE = re.compile(r"\\{1,8}u(?:00ad|200[b-f]|202[a-e]|206[0-9a-f]|feff)", re.IGNORECASE)


def mask(kind: str) -> str:
    return f"[masked {kind}]"


CONTROLS = {c: None for c in [*range(32), 127] if chr(c) not in "\n\t"}


def normalise(text: str) -> str:
    """One spelling for what looks alike (NFKC), and nothing invisible: neither a literal nor an order hides in it."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = "".join(c for c in text if c.isascii() or unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cc"))
    text = text.translate(CONTROLS)
    return INVISIBLE.sub("", text) if "\\" in text else text


def luhn(digits: str) -> bool:
    """The checksum of payment cards."""
    doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


class Sanitiser:
    """Masks texts and messages of one task and counts what it masked, by kind."""

    def __init__(self, literals: Iterable[str] = (), *, secrets: Iterable[str] = (), emails: bool = True) -> None:
        self.hits: Counter[str] = Counter()
        self.emails = emails
        self._answers = pattern(normalise(text) for text in literals)
        self._secrets = pattern(normalise(text) for text in secrets)

    def text(self, text: str) -> str:
        """Mask one text."""
        text = normalise(text)
        text = self._sub(self._secrets, "secret", text)
        text = self._sub(SECRET_SHAPES, "secret", text)
        text = self._sub(EVALUATOR_BLOCKS, "evaluator", text)
        text = self._sub(EVALUATOR_LINES, "evaluator", text)
        text = self._values(CREDENTIALS, "credential", text)
        text = self._sub(DIGITS, "payment", text, lambda m: luhn(re.sub(r"\D", "", m.group())))
        text = self._sub(ACCOUNT_SHAPES, "account", text)
        text = self._values(ACCOUNTS, "account", text)
        if self.emails:
            text = self._sub(EMAILS, "email", text)
        return self._sub(self._answers, "answer", text)

    def known(self, text: str) -> str:
        """Mask the known strings alone: the last pass over a finished prompt, whatever put them there."""
        text = self._sub(self._secrets, "secret", normalise(text))
        return self._sub(self._answers, "answer", text)

    def json(self, value: Any, depth: int = 0) -> Any:
        """Mask inside parsed JSON: keys that name something secret lose their value, every leaf is masked as text."""
        if depth > MAX_DEPTH:
            return self._hit("evaluator")
        if isinstance(value, Mapping):
            return {self.text(str(k)): self._field(str(k), v, depth) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.json(item, depth + 1) for item in value]
        if isinstance(value, str):
            return self.content(value, depth + 1)
        plain = json.dumps(value, default=str)
        masked = self.text(plain)
        return value if masked == plain else masked

    def content(self, text: str, depth: int = 0) -> Any:
        """Mask a text that may be JSON: where it parses, by its structure, else as text."""
        if text.lstrip()[:1] in ("{", "["):
            try:
                return self.json(json.loads(normalise(text)), depth)
            except (ValueError, RecursionError):
                pass
        return self.text(text)

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The visible part of one chat message, masked: role, content, and the calls it makes."""
        record: dict[str, Any] = {"role": str(message.get("role"))}
        if content := message.get("content"):
            record["content"] = self.content(content) if isinstance(content, str) else self.json(content)
        functions = [(call or {}).get("function") or {} for call in message.get("tool_calls") or []]
        calls = [{"name": self.text(str(f.get("name"))), "arguments": self._arguments(f)} for f in functions]
        return {**record, "calls": calls} if calls else record

    def _arguments(self, function: Mapping[str, Any]) -> Any:
        arguments = function.get("arguments")
        return self.content(arguments) if isinstance(arguments, str) else self.json(arguments)

    def _field(self, key: str, value: Any, depth: int) -> Any:
        kind = kind_of_key(key)
        if kind and value not in (None, "", [], {}):
            return self._hit(kind)
        return self.json(value, depth + 1)

    def _hit(self, kind: str) -> str:
        self.hits[kind] += 1
        return mask(kind)

    def _sub(
        self,
        finder: re.Pattern[str] | None,
        kind: str,
        text: str,
        accept: Callable[[re.Match[str]], bool] = lambda match: True,
    ) -> str:
        if finder is None:
            return text
        return finder.sub(lambda match: self._hit(kind) if accept(match) else match.group(), text)

    def _values(self, finder: re.Pattern[str], kind: str, text: str) -> str:
        """Mask the value of `key = value` and leave the key."""
        return finder.sub(lambda match: match["key"] + self._hit(kind), text)


def kind_of_key(key: str) -> str | None:
    """What a JSON key says about its value."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    if EVALUATOR_KEY.match(spaced):
        return "evaluator"
    if CREDENTIAL_KEY.search(key) or CREDENTIAL_KEY.search(spaced):
        return "credential"
    return "account" if ACCOUNT_KEY.search(key) or ACCOUNT_KEY.search(spaced) else None
