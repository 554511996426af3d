"""When to retry a request, and the token budget in which each try reserves and settles its cost."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from email.utils import mktime_tz, parsedate_tz

import openai

LONGEST_PAUSE = 8.0  # seconds, where the endpoint asks for none
LONGEST_ASKED = 120.0  # seconds that an endpoint may ask for; one that asks for more is not retried
_jitter = random.Random()  # of its own: when it is drawn from depends on the clock, and the global one is seeded
RETRIED = (408, 409, 429)  # and 5xx


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
    lost = isinstance(error, openai.APIConnectionError) and not isinstance(error.__cause__, TooLong)
    return own if lost else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the response headers ask to wait (milliseconds, seconds or a date); None if they do not."""
    for name, unit in (("retry-after-ms", 1_000.0), ("retry-after", 1.0)):
        try:
            return max(float(headers[name]) / unit, 0.0)
        except (KeyError, ValueError):
            continue
    date = parsedate_tz(headers.get("retry-after"))
    try:
        return max(mktime_tz(date) - time.time(), 0.0) if date else None
    except (ValueError, OverflowError):
        return None


class TooLong(Exception):
    """An answer of more bytes than any reference needs, or a compressed one of unknown size."""
