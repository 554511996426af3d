"""Environments by import path: what is wrong with one is a line that names it, the method and what is needed."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer import toy
from tests.trainer.rollout.test_episode import Script, setup
from trainer import envs, plugins
from trainer.commands import main
from trainer.config import EnvConfig
from trainer.data import Group, Task
from trainer.envs import template
from trainer.errors import EnvironmentBroken, UserError
from trainer.evaluation.evaluate import refuse, refuse_one
from trainer.preflight import check_env, config_file
from trainer.rollout.siblings import run_group

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def _slow_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a call that sleeps may be said to hold the event loop."""
    if "sleeps" not in request.node.name:
        monkeypatch.setattr(check_env, "LONGEST", 60.0)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the example with lines replaced, as a module in the working directory; return its import path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    count = 0

    def write(*changes: tuple[str, str], name: str = "Suite", after: str = "") -> str:
        nonlocal count
        count += 1
        text = template.environment()
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        module = f"my_env_{tmp_path.name.replace('-', '_')}_{count}"
        (tmp_path / f"{module}.py").write_text(text + after)
        return f"{module}:{name}"

    return write


def play(path: str, timeout: float = 5.0) -> Group:
    """Two siblings of the first task: one call and words."""
    suite = envs.load(path)
    run = setup(Script(*["<call> mail_find sender w1", "w1"] * 8), suite, timeout=timeout)
    return asyncio.run(run_group(run, suite.tasks("train")[0], 2))


RESET = 'return [{"role": "user", "content": task.instruction}], self.tools.schemas'
STEP = 'return await self.tools.answer(message), not message.get("tool_calls")  # words alone end the episode'
OUTCOME = "if self.paid == [self.bill]:"
MAKE = "make = Bills"

IN_A_RUN = {  # change -> what the line says after the plug-in's name
    (RESET, "pass"): "reset returned None, needs (messages, tools)",
    (RESET, "return [], [], {}"): "reset returned tuple of 3, needs (messages, tools)",
    (RESET, "return [], []"): "reset returned no message, needs at least the one",
    (RESET, "return task.instruction, []"): "as messages, needs a list of dicts",
    (RESET, "return ['pay'], []"): "reset returned a message that is 'pay', needs a dict such as {\"role\"",
    (RESET, "return [{'role': 'bot', 'content': 'x'}], []"): "a message with role 'bot', needs one of system",
    (RESET, "return [{'role': 'user', 'content': ['x']}], []"): "with list ['x'] as content, needs a string",
    (RESET, "return [{'role': 'user'}], []"): "with None as content, needs a string",
    (RESET, "return [{'role': 'user', 'content': 'x', 'at': {1}}], []"): "messages that are no JSON",
    (RESET, "return [{'role': 'user', 'content': 'x'}], None"): "None as tools, needs a list of dicts",
    (RESET, "return [{'role': 'user', 'content': 'x'}], [len]"): "a tool that is builtin_function_or_method",
    (RESET, "return [{'role': 'user', 'content': 'x'}], [{'name': 'f'}]"): "a tool that is dict",
    (RESET, "return [{'role': 'user', 'content': 'x'}], [{'function': {}}]"): "a tool without a name",
    (RESET, "return [{'role': 'user', 'content': 'x'}], 2 * self.tools.schemas"): "two tools called mail_find",
    (RESET, "raise KeyError('no such bill')"): "reset raised KeyError: 'no such bill' (my_env_",
    (RESET, "import no_such_package"): "reset raised ModuleNotFoundError: No module named 'no_such_package'",
    (RESET, "yield [], []"): "reset is a generator, needs `async def reset`",
    ("async def reset", "def reset"): "reset is not asynchronous, needs `async def reset`",
    ("async def reset(self, task)", "async def reset(self)"): "reset has another signature",
    ("async def step", "async def no_step"): "has no method step, needs `async def step` with 1 argument",
    (STEP, "pass"): "step returned None, needs (messages, done)",
    (STEP, "return await self.tools.answer(message)"): "step returned list of 0, needs (messages, done)",
    (STEP, "return await self.tools.answer(message), 'no'"): "step returned 'no' as done, needs True or False",
    (STEP, "return [], False"): "step returned no message in an episode that goes on, needs one, or done = True",
    (STEP, "return self.tools.answer(message), False"): "step returned coroutine",
    (STEP, "return [{'role': 'assistant', 'content': 'x'}], False"): "needs those that answer it",
    (STEP, "raise TimeoutError('the server')"): "step",
    (STEP, "import sys; sys.exit(1)"): "step raised SystemExit: 1 (my_env_",
    (STEP, "import asyncio; raise asyncio.CancelledError"): "step raised CancelledError",
    (STEP, "raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})()"): "step raised E (my_env_",
    (STEP, "return 1 / 0"): "step raised ZeroDivisionError: division by zero (my_env_",
    (STEP, "import asyncio; await asyncio.sleep(60)"): "step took longer than env.timeout = 0.5 s",
    (STEP, "import time; time.sleep(60)"): "step held the event loop for env.timeout = 0.5 s; needs `await asyncio.to_",
    (
        STEP,
        "\n        while True:\n            try: 1 / 1\n            except Exception: pass",
    ): "step held the event loop",
    ("async def step", "def step(self, message): return [], True\n\n    async def s"): "step is not asynchronous",
    (OUTCOME, "return 1.0\n        if 1:"): "outcome returned 1.0, needs a trainer.data.Outcome",
    (OUTCOME, "return\n        if 1:"): "outcome returned None, needs a trainer.data.Outcome",
    (OUTCOME, "return Outcome(1.0, success='yes')\n        if 1:"): "outcome returned 'yes' as success, needs True",
    (OUTCOME, "return Outcome(1.0, reason=None)\n        if 1:"): "outcome returned None as reason",
    (OUTCOME, "return Outcome(1.0, [1])\n        if 1:"): "outcome returned list [1] as details, needs a dict",
    (OUTCOME, "return Outcome(None)\n        if 1:"): "outcome returned a reward that is none: needs a number in",
    ("async def outcome", "async def no_outcome"): "has no method outcome, needs `async def outcome` with no argument",
    (MAKE, "def make(self): raise OSError('no display')"): "make raised OSError: no display",
    (MAKE, "def make(self): return None"): "has no method reset",
    (MAKE, "async def make(self): return Bills()"): "make is async",
    (MAKE, "def make(self):\n        import time\n        time.sleep(60)"): "make held the event loop",
}


@pytest.mark.parametrize("change", IN_A_RUN, ids=lambda change: " ".join(change[1].split())[:50])
def test_a_fault_in_a_run_is_named_and_never_scored(write: Write, change: tuple[str, str]) -> None:
    needs, path, began = IN_A_RUN[change], write(change), time.monotonic()
    limit = 0.5 if re.search("0.5 s|held", needs) else 30.0
    try:
        group = play(path, limit)
        line = group.problem
        assert group.rollouts == [] and group.broken == 4
    except UserError as error:  # found when it was loaded
        line = str(error)
    assert needs in line and path in line, line
    assert "\n" not in line and time.monotonic() - began < 20
    assert path in refused(path, limit)


def refused(path: str, limit: float) -> str:
    """What the evaluation's refuser meets: the same line, and no score."""
    try:
        suite = envs.load(path)
        task = suite.tasks("train")[0]
        assert asyncio.run(refuse(suite, [task], limit)) == {}
        asyncio.run(refuse_one(suite, task, limit))
    except (EnvironmentBroken, UserError) as error:
        return str(error)
    raise AssertionError("the refuser met no fault")


TASK = 'Task(f"{to}-{n}", "bills", split, to, "state_changing", f"pay the invoice of {to}", {"to": to, "amount": n})'
AT_SET_UP = {
    (MAKE, ""): "has no method make",
    ("def tasks(self, split)", "def tasks(self)"): "tasks has another signature",
    ("def tasks(self, split)", "async def tasks(self, split)"): "tasks is async, needs a plain `def tasks`",
    ("def refusal(self)", "def refuse(self)"): "has no method refusal, needs `def refusal` with no argument",
    ('name, splits = "bills", {"train": 40, "dev": 10}', "name = 'b'"): "has None as splits",
    (
        'name, splits = "bills", {"train": 40, "dev": 10}',
        "name, splits = 'b', ['train']",
    ): "as splits, needs the number",
    ('name, splits = "bills", {"train": 40, "dev": 10}', "splits = {'train': 40}"): "has None as name, needs a word",
    (TASK, "{'id': to}"): "tasks('train') holds dict",
    (TASK, TASK.replace("{to}-{n}", "{to}")): "holds two tasks with id 'dana'",
    (TASK, TASK.replace("state_changing", "easy")): "of task_class 'easy', needs one of state_changing",
    (TASK, TASK.replace("split, to", "'test', to")): "of split 'test', needs 'train'",
    (TASK, TASK.replace('f"pay the invoice of {to}"', "None")): "raised TypeError: Task.instruction is None, needs",
    ("bills[:40]", "bills[:39]"): "tasks('train') holds 39 tasks, needs 40, as splits says",
    ("bills = [", "raise OSError('disk')\n        bills = ["): "tasks raised OSError: disk (my_env_",
    ("class Suite:", "class Suite:\n    def __init__(self, folder): ..."): "missing a required argument: 'folder'",
    ("class Suite:", "class Suite:\n    def __init__(self): 1 / 0"): "cannot be made (ZeroDivisionError",
    ("class Suite:", "Suite = 3\nclass S:"): "is a int, needs a class",
    ("class Suite:", "async def Suite(): ...\nclass S:"): "is asynchronous, needs a class or a plain function",
    (
        MAKE,
        "make = Bills\n    splits = property(lambda self: 1 / 0)",
    ): "name or splits cannot be read (ZeroDivisionError",
    ("class Suite:", "class Suit:"): "has no Suite; it defines Bills, Suit",
    ("class Suite:", "import sys; sys.exit(3)\nclass Suite:"): "cannot be imported (SystemExit: 3",
    ("class Suite:", "class Suite"): "cannot be imported (SyntaxError",
    ("class Suite:", "import no_such_thing\nclass Suite:"): "No module named 'no_such_thing'",
}


@pytest.mark.parametrize("change", AT_SET_UP, ids=lambda change: " ".join(change[1].split())[:50])
def test_a_fault_at_set_up_is_one_line(
    write: Write, change: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(change)
    with pytest.raises(UserError) as found:
        envs.load(path).tasks("train")
    assert len(found.value.lines) == 1 and path in found.value.lines[0] and AT_SET_UP[change] in found.value.lines[0]
    assert main(["check-env", path]) == 2
    assert AT_SET_UP[change] in capsys.readouterr().out


def test_a_numpy_bool_is_a_bool_and_a_suite_keeps_its_other_attributes(write: Write) -> None:
    path = write((STEP, "import numpy as np; return [], np.bool_(True)"), (MAKE, "make = Bills\n    worlds = 7"))
    assert [r.stop for r in play(path).rollouts] == ["answer", "answer"]
    assert envs.load(path).worlds == 7  # type: ignore[attr-defined]


def test_names_options_and_entry_points(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taking = write(("class Suite:", "class Suite:\n    def __init__(self, size=3, *, deep=False): self.size = size"))
    assert envs.load(taking, size=5).size == 5  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"env.options: .* has no option 'sise'; there are size, deep"):
        envs.load(taking, sise=5)
    anything = write(("class Suite:", "class Suite:\n    def __init__(self, **options): self.options = options"))
    assert envs.load(anything, a=1).options == {"a": 1}  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"no environment is called 'workdya'; there are .*; did you mean 'workday'"):
        envs.load("workdya")
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[sgcd.envs]\ntheirs = {taking}\nworkday = {taking}\ngone = no_such:Suite\n"
    )
    assert (envs.load("theirs").name, envs.load("workday").name) == ("bills", "workday")
    with pytest.raises(UserError, match=r"env.name: gone cannot be imported \(ModuleNotFoundError"):
        envs.load("gone")
    (tmp_path / "other-1.0.dist-info").mkdir()
    (tmp_path / "other-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (tmp_path / "other-1.0.dist-info" / "entry_points.txt").write_text("[sgcd.envs]\ntheirs = another:Suite\n")
    with pytest.raises(UserError, match="'theirs' is offered twice"):
        envs.load("theirs")


@pytest.mark.parametrize("name", ["a:b", "a.b:c", "_x:y"])
def test_what_is_written_as_a_path(name: str) -> None:
    assert plugins.is_path(name)
    with pytest.raises(UserError, match=r"no_such.py:Suite cannot be .* written without .py: no_such:Suite"):
        envs.load("no_such.py:Suite")
    for wrong in (name.replace(":", ""), f"{name}:z", name.replace(":", ": "), f".{name}", name + "."):
        assert not plugins.is_path(wrong)


WRONG_PLAY = {  # found by check-env alone: change -> the check, and what it says
    (OUTCOME, "if not self.paid:"): ("nothing done", "refusing dana-20 is a success"),
    (OUTCOME, "if self.paid == [1]:"): ("gold", "gold of dana-20 fails (reward 0"),
    ('raise ValueError("not found")', "raise KeyError(sender)"): ("mistakes", "step raised KeyError: 'x'"),
    ("async def close(self): ...", "async def close(self): del self.bill"): ("close", "close raised AttributeError"),
    ("async def close(self): ...", "def close(self): ..."): ("nothing done", "close is not asynchronous"),
    ('return {"amount": self.bill["amount"]}', 'import random\n        return {"amount": random.random()}'): (
        "determinism",
        "step differs for dana-20: the same messages twice",
    ),
    (STEP, f"import asyncio; await asyncio.shield(asyncio.sleep(0.02)); {STEP}"): ("", ""),
    (
        STEP,
        "import asyncio\n        try: await asyncio.sleep(0.02)\n        except asyncio.CancelledError: pass\n        "
        + STEP,
    ): ("time-out", "step swallows asyncio.CancelledError"),
    (STEP, f"import time; Bills.slept = getattr(Bills, 'slept', 0) or time.sleep(1.1) or 1; {STEP}"): (
        "event loop",
        "held the event loop for",
    ),
    (STEP, "import asyncio; await asyncio.sleep(60)"): ("nothing done", "step took longer than env.timeout = 1 s"),
}


@pytest.mark.parametrize(
    "change", WRONG_PLAY, ids=lambda c: "sleeps" if "time.sleep" in c[1] else " ".join(c[1].split())[:50]
)
def test_check_env_finds_it(write: Write, change: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    check, needs = WRONG_PLAY[change]
    path = write(change)
    code = main(["check-env", path, "--env.timeout", "1" if "sleep(60)" in change[1] else "60"])
    out = capsys.readouterr().out
    assert code == (2 if check else 0), out
    if check:
        assert re.search(rf"^FAIL +{check} .*{re.escape(path)}.*{re.escape(needs)}", out, re.M), out


SHARED = """
BILL = {}
class Suite(Suite):
    def make(self): return Shared()
class Shared(Bills):
    async def reset(self, task):
        found = await super().reset(task)
        BILL.clear(); BILL.update(paid=[], task=task.data)
        return found
    def wallet_pay(self, to: str, amount: int):
        '''Pay a person.

        Args:
            to: the person
            amount: in whole units'''
        BILL["paid"].append({"to": to, "amount": amount})
        return {"left": len(BILL["paid"])}
    async def outcome(self):
        right = BILL["paid"] == [BILL["task"]]
        return Outcome(float(right), success=right)
"""


def test_check_env_finds_state_that_episodes_share(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-env", write(after=SHARED)]) == 2
    out = capsys.readouterr().out
    assert re.search(r"^FAIL +two at once .*outcome differs for an episode beside others", out, re.M), out
    assert out.count("FAIL ") == 1


def test_a_refused_task_of_the_checked_suite_is_the_toys() -> None:
    """The wrapper adds no rule that the toy environment, written long before it, would break."""
    suite = envs.load("parity")
    assert isinstance(suite.tasks("train")[0], Task) and suite.name == toy.suite().name
    assert main(["check-env", "parity"]) == 0


def test_init_env_writes_what_passes_and_never_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert main(["init-env", "fresh_env"]) == 0
    text = (tmp_path / "fresh_env.py").read_text()
    assert len(text.splitlines()) <= 60
    assert main(["check-env", "fresh_env:Suite"]) == 0 and "ready" in capsys.readouterr().out
    assert main(["check-env", "fresh_env.yaml"]) == 0
    (tmp_path / "fresh_env.py").write_text("mine")
    (tmp_path / "other_env.yaml").write_text("mine")
    for name in ("fresh_env", "other_env", "json", "workday", "a-b", "a.b", "class", "../up", "x/y", ""):
        assert main(["init-env", name]) == 2, name
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "fresh_env.py",
        "fresh_env.yaml",
        "other_env.yaml",
    ]
    assert {(tmp_path / name).read_text() for name in ("fresh_env.py", "other_env.yaml")} == {"mine"}
    assert main(["init-env", "good_env", "--seed", "1"]) == 2
    assert main(["check-env"]) == 2


def test_a_config_names_one(write: Write) -> None:
    assert EnvConfig(name=write()).name.endswith(":Suite")
    with pytest.raises(UserError, match="needs module:function or verifier"):
        config_file.build({"rewards": [{"path": "brevity"}]}, [])
    for section in ("engine", "writer"):
        config_file.build({section: {"name": "my_module:Mine", "options": {"a": 1}}}, [])
        with pytest.raises(UserError, match=rf"{section}.name: got 'mine', needs .* or module:attribute"):
            config_file.build({section: {"name": "mine"}}, [])
