"""The verifier: the benchmark's two checks after each user turn, against a replay of the gold calls.

1. Every public attribute of every API object equals the gold world's.
2. Every result of this turn's gold calls occurs among all results so far (unordered, each result counted once).
A turn whose gold calls are empty asks for nothing; what was done in it still shows at the next turn's state check.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from trainer.data import TaskClass
from trainer.envs.bfcl.data import Entry
from trainer.envs.bfcl.world import World, differing


class Checker:
    """Follows one episode turn by turn and remembers the first failure."""

    def __init__(self, entry: Entry):
        self._entry = entry
        self._gold = World(entry)
        self._results: Counter[str] = Counter()  # of the policy, all turns
        self.failure: dict[str, Any] | None = None

    def end_turn(self, turn: int, world: World, results: list[str]) -> None:
        """Check the turn that has just ended, in which the policy's calls gave `results`."""
        self._results.update(results)
        gold = self._entry.gold[turn]
        expected = Counter(self._gold.call(call) for call in gold)
        if self.failure is not None or not gold:
            return
        if not results:
            self._fail(turn, "no_call")
        elif wrong := differing(self._gold, world):
            self._fail(turn, "state", attributes=wrong)
        elif missing := expected - self._results:
            self._fail(turn, "result", missing=sum(missing.values()))

    def _fail(self, turn: int, reason: str, **more: Any) -> None:
        self.failure = {"failed_turn": turn, "reason": reason, **more}


def gold_class(entry: Entry, turns: int) -> TaskClass:
    """What the gold calls of the first `turns` user turns amount to."""
    calls = [call for turn in entry.gold[:turns] for call in turn]
    if not calls:
        return "no_action"
    before, after = World(entry), World(entry)
    for call in calls:
        after.call(call)
    return "state_changing" if differing(before, after) else "information"
