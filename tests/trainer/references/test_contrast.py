"""The contrast writer's grammar, the ablations, and which siblings are shown."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties import examples
from tests.trainer.references.endpoint_writers import MIXED, run
from tests.trainer.siblings import ToySuite, group, task, with_messages
from trainer.config import WriterConfig
from trainer.references import writers
from trainer.references.contrast import EMPTY_SHELL, contrast, format_reference
from trainer.references.sibling_selection import cut_middle, select


def test_contrast_spells_the_grammar() -> None:
    made = group(
        (["look", "ask", "act"], 1.0),
        (["look", "look", "ask", "act"], 1.0),
        (["look", "act"], 0.0),
        (["look", "act", "shout"], 0.0),
        (["wait"], 0.0),
    )
    assert contrast(made.rollouts) == (
        "steps look ask act answer . check look ask act . avoid shout wait . deviate after look ."
    )


def test_contrast_at_the_start_and_without_words_for_the_difference() -> None:
    assert (
        contrast(group((["look"], 1.0), ([], 0.0)).rollouts) == "steps look answer . check look . deviate after start ."
    )
    # The same names with another argument: only the steps are known.
    assert contrast(group((["look"], 1.0), (["look"], 0.0)).rollouts) == "steps look answer ."
    assert contrast(group((["look"], 1.0), (["look", "act"], 1.0)).rollouts) == ""


def test_contrast_never_repeats_values_or_hidden_labels() -> None:
    made = group((["look", "exfil_4111"], 1.0), (["act", "HIDDEN"], 0.0))
    text = contrast(made.rollouts)
    assert text == "steps look answer . check look . avoid act . deviate after start ."
    bad = [{"role": "assistant", "tool_calls": [{"function": None}, None, {"function": {"name": 3}}]}]
    assert contrast(with_messages((bad, 1.0), ([], 0.0)).rollouts) == "steps answer ."


def test_format_reference_caps_and_closes() -> None:
    long = format_reference(["look"] * 99, ["a"] * 99)
    assert long.split(" . ")[0].split() == ["steps", *["look"] * 23, "answer"]
    assert format_reference(["look", "answer"]) == "steps look answer ."
    assert format_reference([]) == "steps answer ."


names = st.lists(st.sampled_from(["look", "ask", "act", "shout"]), max_size=5)


@given(st.lists(names, min_size=1, max_size=4), st.lists(names, min_size=1, max_size=4))
@settings(max_examples=examples(100))
def test_contrast_properties(good: list[list[str]], bad: list[list[str]]) -> None:
    made = group(*[(g, 1.0) for g in good], *[(b, 0.0) for b in bad])
    text = contrast(made.rollouts)
    sections = {s.split()[0]: s.split()[1:] for s in text.removesuffix(" .").split(" . ")}
    assert sections["steps"][:-1] in good
    assert not set(sections.get("avoid", [])) & {name for g in good for name in g}
    assert all(any(name not in b for b in bad) for name in sections.get("check", []))
    assert text == " ".join(text.split())
    assert text == text.lower()


def test_ablation_writers() -> None:
    pure = group((["look"], 1.0), of=task("s3"))
    one, two = group(*MIXED, of=task("s1")), group((["ask"], 1.0), ([], 0.0), of=task("s2"))
    run(writers.load(WriterConfig(name="contrast"), ToySuite()), one, two, pure)
    own = one.reference, two.reference
    assert all(own)
    assert pure.reference == ""
    run(writers.load(WriterConfig(name="wrong_task"), ToySuite()), one, two, pure)
    assert (one.reference, two.reference, pure.reference) == (*own[::-1], "")
    run(writers.load(WriterConfig(name="empty_shell"), ToySuite()), one, two, pure)
    assert (one.reference, two.reference, pure.reference) == (EMPTY_SHELL, EMPTY_SHELL, "")
    run(writers.load(WriterConfig(name="none"), ToySuite()), one, two, pure)
    assert one.reference == two.reference == pure.reference == ""


def test_wrong_task_needs_another_scenario() -> None:
    one, same = group(*MIXED), group(*MIXED)
    run(writers.load(WriterConfig(name="wrong_task"), ToySuite()), one, same)
    assert one.reference == ""
    assert one.reference_info["error"] == "no_other_scenario"


def test_selection_follows_the_smaller_class() -> None:
    ok, bad = ["s" * n for n in (9, 2, 5)], ["f" * 4]
    assert select(ok, bad, len, 100) == (ok, bad)
    assert select(ok, bad, len, 12) == (["ss"], bad)  # more successes: the shorter
    bad = ["f" * n for n in (3, 9, 6)]
    assert select(["s" * 4], bad, len, 12) == (["s" * 4], ["f" * 9])  # more failures: the longer
    ok = ["a" * 5, "b" * 5]
    assert select(ok, bad, len, 30) == (ok, bad) or len(select(ok, bad, len, 20)[0]) == 1
    assert len(cut_middle("x" * 999, 100)) < 150
