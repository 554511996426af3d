"""AppWorld: code actions in a simulated world of apps. It runs in processes of its own (docs/appworld.md)."""

from __future__ import annotations

from trainer.envs.appworld.suite import AppWorldSuite

suite = AppWorldSuite
