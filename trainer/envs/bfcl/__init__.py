"""BFCL multi-turn (Berkeley Function Calling Leaderboard): stateful APIs, 4 x 200 conversations with gold."""

from __future__ import annotations

from trainer.envs.bfcl.suite import BfclSuite

suite = BfclSuite
