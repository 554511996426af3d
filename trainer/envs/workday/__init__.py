"""`workday`: a small stateful office with hidden conditions. Tasks are generated from seeds; the verifier is exact."""

from __future__ import annotations

from trainer.envs.workday.environment import WorkdaySuite


def suite() -> WorkdaySuite:
    """Return the suite; it takes no options."""
    return WorkdaySuite()
