"""What a step sampled, counted by hand."""

from __future__ import annotations

import pytest

from tests.trainer.records.made_rollouts import call, rollout, said, task
from trainer.data import Group
from trainer.records.rollout_metrics import rollout_metrics


def test_rollout_metrics_count_what_was_sampled() -> None:
    won = rollout(1.0, [call(to="amy"), said("done")], generated=6)
    idle = rollout(1.0, [said("no")], generated=2, task=task("u", "no_action"))
    lost = rollout(0.0, [call(to="bob"), call(to="eve")], generated=4, stop="max_turns")
    groups = [Group(task(), [won, lost]), Group(task("u", "no_action"), [idle, idle])]
    m = rollout_metrics(groups)
    assert m["reward"] == 0.75
    assert m["reward_std"] == 0.25  # the means of 0.5 and 0
    assert (m["by_group/frac_mixed"], m["by_group/frac_solved"], m["by_group/frac_failed"]) == (0.5, 0.5, 0)
    assert (m["stop/answer"], m["stop/max_turns"]) == (0.75, 0.25)
    assert m["completions/mean_length"] == 3.5  # generated tokens only
    assert m["completions/mean_length_solved"] == pytest.approx(10 / 3)
    assert m["completions/mean_length_failed"] == 4
    assert m["tools/per_rollout"] == 0.75
    assert m["tools/zero_share_of_solved"] == pytest.approx(2 / 3)
    assert (m["success/state_changing"], m["success/no_action"], m["success/class_balanced"]) == (0.5, 1.0, 0.75)
