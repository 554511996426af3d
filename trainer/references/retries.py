"""When to retry a request, and the token budget in which each try reserves and settles its cost."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from email.utils import mktime_tz, parsedate_tz

import openai

from trainer.references.bounded_reading import TooLong
from trainer.references.completion_body import ErrorInBody

LONGEST_PAUSE = 8.0  # seconds, where the endpoint asks for none
LONGEST_ASKED = 120.0  # seconds that an endpoint may ask for; one that asks for more is not retried
_jitter = random.Random()  # of its own: when it is drawn from depends on the clock, and the global one is seeded
RETRIED = (408, 409, 429)  # and 5xx
NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?")
DURATION_PART = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)(ms|[smhd])")
DURATION = re.compile(rf"(?:{DURATION_PART.pattern})+")
UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
EPOCH = 1e9  # seconds: a larger number is a time of day, not a pause


class Budget:
    """Tokens of the whole run. A try reserves its worst case first, so `spent + reserved` never exceeds `limit`."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.spent = 0
        self.reserved = 0

    def reserve(self, tokens: int) -> bool:
        if not self.allows(self.reserved + tokens):
            return False
        self.reserved += tokens
        return True

    def allows(self, tokens: int) -> bool:
        """Whether this many may still be spent, ignoring reservations."""
        return self.limit is None or self.spent + tokens <= self.limit

    def settle(self, reserved: int, spent: int) -> None:
        """Release a reservation and record what was spent of it."""
        assert 0 <= spent <= reserved, (spent, reserved)
        self.reserved -= reserved
        self.spent += spent


def pause_after(error: Exception, tries: int) -> float | None:
    """Seconds to wait after the `tries`-th try: as the endpoint asks, else longer each time; None: do not retry.

    408, 409, 429, 5xx, time-outs and lost connections are retried, as in the official client, but not an answer that
    was refused unread.
    """
    own = min(0.5 * 2.0 ** (tries - 1), LONGEST_PAUSE) * _jitter.uniform(0.75, 1.0)
    if isinstance(error, openai.APIStatusError):
        if error.status_code not in RETRIED and error.status_code < 500:
            return None
        asked = retry_after(error.response.headers)
        if asked is None:
            return own
        return asked if asked <= LONGEST_ASKED else None
    if isinstance(error.__cause__, ErrorInBody):
        status = error.__cause__.status or 0
        return own if status in RETRIED or status >= 500 else None
    lost = isinstance(error, openai.APIConnectionError) and not isinstance(error.__cause__, TooLong)
    return own if lost else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the response headers ask to wait (milliseconds, seconds or a date), or until a spent limit resets.

    None if they ask for nothing; what is no number of seconds (nan, inf, words) asks for nothing.
    """
    for name, unit in (("retry-after-ms", 1_000.0), ("retry-after", 1.0)):
        if NUMBER.fullmatch(value := headers.get(name, "").strip()):
            return max(float(value) / unit, 0.0)
    date = parsedate_tz(headers.get("retry-after"))
    try:
        if date:
            return max(mktime_tz(date) - time.time(), 0.0)
    except (ValueError, OverflowError):
        pass
    resets = [_reset(headers, what) for what in ("-requests", "-tokens", "")]
    return max((seconds for seconds in resets if seconds is not None), default=None)


def _reset(headers: Mapping[str, str], what: str) -> float | None:
    """Seconds until a spent limit of requests or tokens resets: a duration such as 6m0s, seconds, or a Unix time."""
    if headers.get(f"x-ratelimit-remaining{what}", "").strip() != "0":
        return None
    value = headers.get(f"x-ratelimit-reset{what}", "").strip()
    if value and DURATION.fullmatch(value):
        return sum(float(number) * UNITS[unit] for number, unit in DURATION_PART.findall(value))
    if not NUMBER.fullmatch(value):
        return None
    seconds = float(value)
    if seconds > EPOCH:  # a time, in milliseconds where it would be thousands of years away
        seconds = (seconds / 1_000.0 if seconds > 1_000.0 * EPOCH else seconds) - time.time()
    return max(seconds, 0.0)
