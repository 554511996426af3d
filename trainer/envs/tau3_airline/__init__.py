"""tau3-bench airline: fifty conversations with a simulated user whose requests an airline's policy may not allow."""

from __future__ import annotations

from trainer.envs.tau3_airline.suite import Tau3AirlineSuite

suite = Tau3AirlineSuite
