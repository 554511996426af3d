"""The page of a run: true to the data, closed to the network, deaf to markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.trainer.siblings import rollout, task
from trainer.data import Group, Rollout
from trainer.errors import UserError
from trainer.records import rollout_files, view_page

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>%%DATA%%\u2028"


def sampled(length: int, reward: float) -> Rollout:
    made = rollout(["look"], reward)
    made.ids = list(range(length))
    made.generated = [i % 3 != 0 for i in range(length)]
    made.logprobs, made.turns, made.classes = [-0.5] * length, [i // 3 for i in range(length)], [1] * length
    made.stop, made.success = "answer", reward >= 1
    made.components, made.reason = {"verifier": reward, "brevity": 0.25}, "" if made.success else "wrong_argument"
    return made


def scores(length: int) -> SimpleNamespace:
    steps = torch.arange(length, dtype=torch.float32)
    return SimpleNamespace(
        student_logp=-steps,
        teacher_logp=-steps - 1,
        student_entropy=steps / 10,
        teacher_entropy=steps / 20,
        divergence=torch.where(steps == 1, torch.nan, steps / 7),
        weights=1 + steps / length,
        saliency=steps / length,
        span_ids=torch.arange(length) - 1,
    )


def pieces(ids: Sequence[int]) -> list[str]:
    return [EVIL if i == 2 else f"w{i} " for i in ids]


def make_run(
    folder: Path,
    *,
    groups: int = 2,
    length: int = 9,
    steps: Sequence[int] = (1, 5),
    rewards: Sequence[float] = (1.0, 0.0),
    pieces_of: rollout_files.Pieces = pieces,
) -> Path:
    made, scored = [], []
    for g in range(groups):
        group = Group(task(f"s{g}", EVIL), [sampled(length, reward) for reward in rewards])
        group.reference = f"steps look {EVIL}" if g == 0 else ""
        group.reference_info = {"writer": "contrast", "error": EVIL}
        made.append(group)
        scored.append([scores(length) for _ in rewards])
    for step in steps:
        rollout_files.write_step(folder / "rollouts" / f"step_{step}.jsonl", made, scored, pieces_of)
    records = [
        {"step": 0, "eval/toy/tgc": 0.25},
        {"step": 1, "reward": 0.5, "loss": None},
        {"step": 2, "reward": 2 / 3},
    ]
    lines = [json.dumps(r) for r in records]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "rew']))
    (folder / "config.yaml").write_text(f"arm: sgcd\nseed: 3\nmodel: {{path: {json.dumps(EVIL)}}}\n")
    return folder


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S
    )
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_traces_round_trip(tmp_path: Path) -> None:
    make_run(tmp_path)
    groups = list(rollout_files.read_step(tmp_path / "rollouts" / "step_1.jsonl"))
    one = groups[0]["siblings"][0]
    assert one["ids"] == list(range(9))
    assert one["d"][0] == 0.0
    assert one["d"][1] is None  # what is no number is null, and the file is valid JSON
    assert one["W"][8] == pytest.approx(1 + 8 / 9, abs=1e-6)
    assert one["span"] == list(range(-1, 8))
    assert all(
        len(one[name]) == 9 for name in (*rollout_files.SCORES, "pieces", "generated", "turns", "classes", "logprobs")
    )
    assert "HIDDEN" not in (tmp_path / "rollouts" / "step_1.jsonl").read_text()  # the verifier's details stay out
    assert not list(tmp_path.rglob("*.tmp"))


def test_traces_without_scores(tmp_path: Path) -> None:
    path = tmp_path / "step_1.jsonl"
    rollout_files.write_step(path, [Group(task(), [sampled(4, 1.0)])], None, pieces)
    assert "W" not in next(rollout_files.read_step(path))["siblings"][0]
    (tmp_path / "rollouts").mkdir()
    path.rename(tmp_path / "rollouts" / path.name)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert data_of(view_page.write(tmp_path))["steps"][0]["groups"]


def test_the_page_holds_what_the_run_wrote(tmp_path: Path) -> None:
    data = data_of(view_page.write(make_run(tmp_path)))
    # A loss of null is no point, and the line that a killed run left unfinished is skipped.
    assert data["curves"] == {"eval/toy/tgc": [[0, 0.25]], "reward": [[1, 0.5], [2, 0.66667]]}
    assert [s["step"] for s in data["steps"]] == [1, 5]
    group = data["steps"][0]["groups"][0]
    one = group["siblings"][0]
    assert group["reference"] == f"steps look {EVIL}"
    assert one["W"][0] is None  # an observed token has no weight
    assert one["W"][1:3] == [1.111, 1.222]
    assert one["pieces"][2] == EVIL
    assert "teacher_logp" in one
    untaught = data["steps"][0]["groups"][1]["siblings"][0]
    assert "teacher_logp" not in untaught  # no reference, no teacher
    assert data["config"] == {"arm": "sgcd", "seed": "3", "model.path": EVIL}
    assert data["notes"] == []


def test_no_text_of_the_run_is_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = view_page.write(make_run(tmp_path)).read_text(encoding="utf-8")
    assert len(re.findall(r"<script", page)) == 2
    assert "<img" not in page
    script = page.rsplit("<script>", 1)[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'; style-src 'sha256-" in page
    assert f"script-src 'sha256-{digest}'" in page
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch(", "import("):
        assert forbidden not in script


def test_a_big_run_is_truncated_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_page, "MAX_TOKENS", 80)
    monkeypatch.setattr(view_page, "MAX_STEPS", 2)
    monkeypatch.setattr(view_page, "MAX_POINTS", 2)
    monkeypatch.setattr(view_page, "MAX_SIBLINGS", 1)
    monkeypatch.setattr(view_page, "MAX_CURVES", 1)
    make_run(tmp_path, groups=6, steps=(1, 2, 3, 4))
    data = data_of(view_page.write(tmp_path))
    assert [s["step"] for s in data["steps"]] == [1, 4]
    assert len(data["steps"][0]["groups"]) == 4
    assert data["steps"][0]["groups"][0]["left_out"] == 1
    notes = " ".join(data["notes"])
    assert "2 of 4 traced steps" in notes
    assert "step 4: 4 of 6 groups" in notes
    assert "1 of 2 metrics" in notes
    assert list(data["curves"]) == ["eval/toy/tgc"]


def test_every_curve_and_the_whole_page_are_bounded(tmp_path: Path) -> None:
    """Evaluations too: a long run that evaluates after every step made a page of 81 MB."""
    make_run(tmp_path)
    record = {f"eval/toy/figure_{i}": 0.123456789 for i in range(700)}
    with (tmp_path / "metrics.jsonl").open("w") as out:
        for step in range(3_000):
            out.write(
                json.dumps({"step": step, **record}) + "\n" if step % 10 == 0 else f'{{"step": {step}, "loss": 1}}\n'
            )
    for step in range(100, 400):
        (tmp_path / "rollouts" / f"step_{step}.jsonl").write_text("{")
    page = view_page.write(tmp_path)
    data = data_of(page)
    assert page.stat().st_size < 4_000_000
    assert len(data["curves"]) == view_page.MAX_CURVES
    assert len(data["notes"]) == view_page.MAX_NOTES + 1


def test_points_of_a_long_curve_are_spread_evenly(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": {i}, "time/a": 1, "time/b": {i % 2}}}\n' for i in range(2_001))
    )
    data = data_of(view_page.write(tmp_path))
    loss = [step for step, _ in data["curves"]["loss"]]
    assert (loss[0], loss[-1], len(loss)) == (0, 2_000, view_page.MAX_POINTS)
    assert dict(data["time_shares"]["time/a"]) == {step: 0.5 if step % 2 else 1.0 for step in loss}
    assert len(data["notes"]) == 2


def test_the_budget_of_tokens_holds_however_long_a_group_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps first, then fewer siblings, then the beginning of one."""
    monkeypatch.setattr(view_page, "MAX_TOKENS", 40)
    make_run(tmp_path, steps=range(1, 9))  # groups of 18 tokens
    assert [s["step"] for s in data_of(view_page.write(tmp_path))["steps"]] == [1, 8]
    monkeypatch.setattr(view_page, "MAX_TOKENS", 15)
    (only,) = data_of(view_page.write(tmp_path))["steps"]
    assert (only["step"], only["groups"][0]["left_out"], len(only["groups"][0]["siblings"][0]["pieces"])) == (8, 1, 9)
    monkeypatch.setattr(view_page, "MAX_TOKENS", 5)
    (only,) = data_of(view_page.write(tmp_path))["steps"]
    assert (only["groups"][0]["siblings"][0]["cut"], len(only["groups"][0]["siblings"][0]["W"])) == (4, 5)


def test_metrics_under_earlier_names_are_shown_under_current_ones(tmp_path: Path) -> None:
    """And one that was resumed since has one curve; `credit/inert` had another meaning then."""
    earlier = {"step": 1, "credit/w_mean": 1.2, "credit/d_mean": 0.3, "credit/inert": 1.0, "credit/spans": 2.5}
    later = {"step": 2, "credit/mean_weight": 1.3, "credit/mean_divergence": 0.4, "credit/inert": 0.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (earlier, later)))
    curves = data_of(view_page.write(tmp_path))["curves"]
    assert curves["credit/mean_weight"] == [[1, 1.2], [2, 1.3]]
    assert curves["credit/mean_divergence"] == [[1, 0.3], [2, 0.4]]
    assert curves["credit/low_divergence"] == [[1, 1.0]]
    assert curves["credit/spans_per_rollout"] == [[1, 2.5]]
    assert curves["credit/inert"] == [[2, 0.0]]


def test_damaged_traces_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "rollouts" / "step_5.jsonl").write_text('{"schema": 1')
    (tmp_path / "rollouts" / "step_9.jsonl").write_text('{"schema": 1}\n')
    uneven = json.loads((tmp_path / "rollouts" / "step_1.jsonl").read_text().split("\n")[0])
    uneven["siblings"][0]["pieces"].pop()
    for step, text in enumerate(["[1]\n", json.dumps(uneven) + "\n", "[" * 100_000, '{"task": 3, "siblings": {}}'], 10):
        (tmp_path / "rollouts" / f"step_{step}.jsonl").write_text(text)
    (tmp_path / "rollouts" / "step_20.jsonl").mkdir()
    data = data_of(view_page.write(tmp_path))
    assert [s["step"] for s in data["steps"]] == [1]
    assert len(data["notes"]) == 7


def test_numbers_that_no_float_holds_are_no_points(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "a": 1{"0" * 400}, "b": NaN, "c": true, "d": 2}}\n')
    assert data_of(view_page.write(tmp_path))["curves"] == {"d": [[1, 2]]}


@pytest.mark.parametrize("text", [None, "", "{}\n", "garbage\n[1]\n"])
def test_a_folder_without_metrics_is_the_users_mistake(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl: no metrics to show"):
        view_page.write(tmp_path)
