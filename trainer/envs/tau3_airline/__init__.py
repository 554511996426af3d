"""tau3-bench airline: fifty conversations with a customer whose requests an airline's policy does or does not allow."""

from __future__ import annotations

from trainer.envs.tau3_airline.suite import Tau3AirlineSuite

suite = Tau3AirlineSuite
