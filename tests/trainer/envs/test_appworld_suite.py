"""The AppWorld suite: its data folder, its tasks, its prompt; and which errors it names."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.speed import cpu_seconds
from trainer import envs
from trainer.envs.appworld import data, prompt
from trainer.errors import UserError


def make_python(folder: Path, apps: bool = True) -> Path:
    package = folder / "lib/python3.11/site-packages/appworld"
    (package / "apps" / "supervisor" if apps else package).mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()
    return folder / "bin" / "python"


def make_root(folder: Path) -> Path:
    """A data root as far as the trainer's process reads one."""
    for name, answer in {"abc_1": 120, "abc_2": None}.items():
        task = folder / "data" / "tasks" / name
        (task / "ground_truth").mkdir(parents=True)
        (task / "dbs").mkdir()
        (task / "dbs" / "notes.jsonl").write_text("[]")
        person = {"first_name": "Ada", "last_name": "Byron", "email": "ada@example.com", "phone_number": "555"}
        (task / "specs.json").write_text(json.dumps({"instruction": "Count Milk notes", "supervisor": person}))
        (task / "ground_truth" / "answer.json").write_text(json.dumps(answer))
        private = {"titles": ["milk", "Secret plan"], "ids": [7, 4711], "all": True}
        (task / "ground_truth" / "private_data.json").write_text(json.dumps(private))
    for part in data.SHARED:
        (folder / "data" / part).mkdir()
    (folder / "data" / "datasets").mkdir()
    (folder / "data" / "datasets" / "train.txt").write_text("abc_1\nabc_2:tag\n")
    (folder / "data" / "datasets" / "test_normal.txt").write_text("abc_1\n")
    return folder


def load(tmp_path: Path, **options: Any) -> Any:
    return envs.load("appworld", python=str(make_python(tmp_path / "venv")), **options)


def test_a_missing_interpreter_package_or_root_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("APPWORLD_ROOT", raising=False)
    with pytest.raises(UserError, match=r"nowhere/python is not there; run: make appworld"):
        envs.load("appworld", python="nowhere/python")
    bare = tmp_path / "bare" / "bin"
    bare.mkdir(parents=True)
    (bare / "python").touch()
    with pytest.raises(UserError, match=r"appworld is not installed beside .*; run: make appworld"):
        envs.load("appworld", python=str(bare / "python"))
    packed = make_python(tmp_path / "packed", apps=False)
    with pytest.raises(UserError, match=r"still packed; run: .*packed/bin/appworld install"):
        envs.load("appworld", python=str(packed))
    with pytest.raises(
        UserError, match=r"APPWORLD_ROOT is not set; run: \S+ download data --root ~/appworld && export"
    ):
        load(tmp_path)
    with pytest.raises(UserError, match=r"no data/datasets; run: \S+ download data"):
        envs.load("appworld", python=str(tmp_path / "venv/bin/python"), root=str(tmp_path))


@pytest.mark.parametrize("options", [{"worlds": 0}, {"worlds": 1.5}, {"execution_timeout": 0}, {"root_": "x"}])
def test_options_that_do_not_fit_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        load(tmp_path, root=str(make_root(tmp_path)), **options)


def test_tasks_know_their_scenario_and_class_and_hold_no_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPWORLD_ROOT", str(make_root(tmp_path)))
    suite = load(tmp_path)
    assert suite.splits == {"train": 2, "test_normal": 1}
    assert suite.worlds == 16  # `check` holds it against the rollouts of a step
    asks, acts = suite.tasks("train")
    assert (asks.id, asks.scenario, asks.task_class) == ("abc_1", "abc", "information")
    assert (acts.id, acts.scenario, acts.task_class) == ("abc_2", "abc", "state_changing")
    assert not any(word in f"{asks}{asks.data}" for word in ("120", "4711", "Secret", "ground_truth"))


def test_answer_literals_are_what_the_instruction_does_not_say(tmp_path: Path) -> None:
    suite = load(tmp_path, root=str(make_root(tmp_path)))
    asks, acts = suite.tasks("train")
    assert suite.answer_literals(asks) == ["120", "4711", "Secret plan"]
    assert suite.answer_literals(acts) == ["4711", "Secret plan"]


def test_damaged_data_is_named(tmp_path: Path) -> None:
    suite = load(tmp_path, root=str(make_root(tmp_path)))
    (tmp_path / "data/tasks/abc_1/ground_truth/answer.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged appworld data: .*abc_1/ground_truth/answer.json"):
        suite.tasks("train")


def test_a_world_is_given_no_truth_and_no_way_to_it(tmp_path: Path) -> None:
    root, place = make_root(tmp_path / "root"), tmp_path / "place"
    data.copy_shared(root, tmp_path / "shared")
    data.lay_out(root, "abc_1", tmp_path / "shared", place)
    found = {str(p.relative_to(place / "data")) for p in place.rglob("*")}
    task = {"tasks", "tasks/abc_1", "tasks/abc_1/dbs", "tasks/abc_1/dbs/notes.jsonl", "tasks/abc_1/specs.json"}
    assert found - {"."} == task | {"base_dbs", "api_docs"}
    assert not any(p.resolve().is_relative_to(root) for p in place.rglob("*"))
    data.reveal(root, "abc_1", place)
    assert (place / "data/tasks/abc_1/ground_truth/answer.json").read_text() == "120"


@pytest.mark.parametrize(
    ("text", "code", "more"),
    [
        ("I look.\n```python\nprint(1)\n```", "print(1)", False),
        ("```python\na = 1\n\nb = 2\n```\nand\n```python\nprint(3)\n```", "a = 1\n\nb = 2", True),
        ("```\nprint(1)\n```", "print(1)", False),
        ("```python\nprint('open')", "print('open')", False),
        ("no code at all", "", False),
        ("```python\n```", "", False),
        ("", "", False),
        ("So: ```python\nprint(1)```", "print(1)", False),  # the benchmark's agent takes both
        ("```python\nprint(1)\n``` That is it.\n```python\nprint(2)\n```", "print(1)", True),
        ("```Python\nprint(1)\n```", "print(1)", False),
        ("```python3\nprint(1)\n```", "print(1)", False),
        ("``` python \nprint(1)\n```", "print(1)", False),
        ("```python\r\na = 1\r\nprint(a)\r\n```\r\nDone.", "a = 1\r\nprint(a)", False),
        ("  ```python\n  print(1)\n  ```", "print(1)", False),
        ("```json\n{}\n```\nThen:\n```python\nprint(2)\n```", "print(2)", False),
        ("```Python\nprint(1)\n```\nI will delete all notes.\n```python\nprint(2)\n```", "print(1)", True),
        ("```ruby\nputs 1\n```\nI will delete all notes.\n```ruby\nputs 2\n```", "", False),
        ("```python print(1)```\nI will delete all notes.\n```python\nprint(2)\n```", "print(2)", False),
        ("```python\nprint('''```''')\nprint(2)\n```", "print('''```''')\nprint(2)", False),
        ("Write ``` first.\nThen:\n```python\nprint(3)\n```", "print(3)", False),
        ("````python\nprint(1)\n````", "print(1)", False),
        ('```python\nx = """\n```\n"""\nprint(x)\n```\nDone.', 'x = """\n```\n"""\nprint(x)', False),
        (
            "```python\nx = '''\n```python\nf()\n```\n'''\n```\n```\nmore\n```",
            "x = '''\n```python\nf()\n```\n'''",
            True,
        ),
        ('```python\nx = """\n```\n"""', 'x = """\n```\n"""', False),  # never closed
        ("```python\n# ```\n# it's code\n# ```\nprint(1)\n```", "# ```\n# it's code\n# ```\nprint(1)", False),
        ("```python\nprint(1)  # it's one```\nDone.", "print(1)  # it's one", False),
        ("```python\nprint(1)  # one ```\nDone.", "print(1)  # one", False),
        ("```python\nx = 'it\\'s ```'\ny = \"```\"\n```", "x = 'it\\'s ```'\ny = \"```\"", False),
        ("```python\nx = '''open\n```\nDone.", "x = '''open", False),
        ("````python\nx = 1\n```\ny = 2\n````", "x = 1\n```\ny = 2", False),
        ("```python\nprint(1)\n`````\nDone.", "print(1)", False),
    ],
)
def test_the_first_block_is_the_action(text: str, code: str, more: bool) -> None:
    assert prompt.code_of({"role": "assistant", "content": text}) == (code, more)


@pytest.mark.parametrize("text", ["```" + " " * 200_000, "``` " * 50_000, "```x\n" * 50_000, "\n" * 200_000])
def test_finding_the_code_takes_no_time(text: str) -> None:
    """Beside prose of that length: the slowest takes four times as long."""
    prose = ("The room is free. " * 20_000)[: len(text)]
    took, usual = (cpu_seconds(lambda t=t: prompt.code_of({"role": "assistant", "content": t})) for t in (text, prose))
    assert took < 50 * usual


def test_the_prompt_names_the_supervisor_and_the_task(tmp_path: Path) -> None:
    suite = load(tmp_path, root=str(make_root(tmp_path)))
    system, user = prompt.first_messages(suite.tasks("train")[0])
    for name in (
        "show_app_descriptions()",
        "show_api_descriptions(app_name=",
        "show_api_doc(app_name=",
        "complete_task",
    ):
        assert name in system["content"]
    for words in ("Ada Byron", "ada@example.com", "555", "Count Milk notes"):
        assert words in user["content"]
    assert prompt.code_of(suite.refusal())[0] == prompt.GIVE_UP


def test_waiting_for_a_place_is_not_timed() -> None:
    """An environment that offers `open` may queue for longer than env.timeout."""
    from tests.trainer import toy
    from tests.trainer.rollout.test_episode import Script, play

    class Queued(toy.ParityEnvironment):
        async def open(self) -> None:
            self.log.append("open")
            await asyncio.sleep(2.5)

    class Suite(toy.ParitySuite):
        def make(self) -> Queued:
            return Queued(self.log, self.faults)

    suite = Suite()
    rollout = play(Script("w1 w2"), suite, timeout=2.0)
    assert rollout.reward == 1
    assert suite.log[:2] == ["open", "reset"]
