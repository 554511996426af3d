"""Hypothesis profiles of our own, so that property tests do the same on every machine.

Where `CI` is set, Hypothesis would draw the same examples every time; elsewhere it would replay failures from a folder
of earlier runs. Here every run draws anew, remembers nothing, and a failure prints what brings it back.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

USUAL = 100  # examples of a test that names no number
for name, times in (("usual", 1), ("thorough", 100)):
    settings.register_profile(
        name,
        max_examples=USUAL * times,
        derandomize=False,
        database=None,
        print_blob=True,
        deadline=None,  # this and `too_slow` would fail on a machine that has other things to do
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("usual")


def examples(count: int) -> int:
    """The `max_examples` of a test that draws `count` in the usual profile; thorough draws 100 times as many."""
    return count * settings.default.max_examples // USUAL
