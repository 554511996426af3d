"""References that are supplied, and what the policy quotes of them."""

from __future__ import annotations

import pytest

from tests.trainer.records.made_rollouts import call, rollout, said, task
from trainer.data import Group
from trainer.records.reference_metrics import argument_overlap, leaked_phrases, reference_metrics


def test_a_phrase_of_the_reference_counts_only_when_nothing_else_showed_it() -> None:
    reference = "always check the calendar first before you book"
    leaked = rollout(1.0, [said("I always check the calendar first")])
    told = rollout(1.0, [said("I always check the calendar first")])
    told.prompt_messages = [{"role": "system", "content": "Please always check the calendar first ."}]
    own = rollout(0.0, [said("booked it")])
    group = Group(task(), [leaked, told, own], reference=reference)
    assert leaked_phrases(group) == pytest.approx(1 / 3)


def test_reference_metrics_count_failures_and_overlap() -> None:
    good = Group(task(), [rollout(1.0, [call(to="amy", day="monday")])], reference="write to amy")
    good.reference_info = {"tokens": 30, "seconds": 0.5, "sanitiser_hits": {"email": 2, "amount": 1}}
    failed = Group(task(), [rollout(0.0)], reference_info={"error": "timeout"})
    m = reference_metrics([good, failed])
    assert m["reference/supplied"] == 0.5
    assert (m["reference/errors"], m["reference/error/timeout"]) == (1, 1)
    assert m["reference/sanitiser_hits"] == 3
    assert m["leak/argument_overlap"] == 0.5


def test_only_what_nothing_else_showed_counts_as_taken_from_the_reference() -> None:
    root = rollout(1.0, [call(path="."), call(path="...")])
    told = rollout(1.0, [call(to="Amy")], prompt_messages=[{"role": "user", "content": "Write to amy, please"}])
    found = rollout(1.0, [{"role": "tool", "content": '{"to":"amy"}'}, call(to="amy")])
    taken = rollout(0.0, [call(to="Amy")])
    reference = "steps send answer . avoid amy ."
    for one, share in ((root, 0.0), (told, 0.0), (found, 0.0), (taken, 1.0)):
        assert argument_overlap(Group(task(), [one], reference=reference)) == share
