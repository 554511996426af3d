"""The AppWorld adapter against the benchmark itself, on a data root made here: `make test-appworld`."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from trainer import envs
from trainer.config import EnvConfig
from trainer.data import Completion, Group, Message, Outcome, Rollout, Sampling, Task
from trainer.envs.appworld.data import PYTHON
from trainer.envs.appworld.prompt import CRASHED, NO_CODE, ONLY_FIRST, block
from trainer.envs.appworld.suite import AppWorldSuite
from trainer.evaluation import estimates, evaluate
from trainer.records.rollout_files import describe
from trainer.rollout.episode import RolloutSetup, play_episode

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"{PYTHON} is not there; `make appworld` makes it"),
]

LOGIN = """
accounts = {a["account_name"]: a["password"] for a in apis.supervisor.show_account_passwords()}
me = apis.supervisor.show_profile()["email"]
token = apis.simple_note.login(username=me, password=accounts["simple_note"])["access_token"]
"""
COUNT = """
notes = apis.simple_note.search_notes(access_token=token, page_limit=20)
print(sum("{tag}" in note["tags"] for note in notes))
"""
WRITE = 'print(apis.simple_note.create_note(access_token=token, title="{title}", content="{content}"))'
STRAY = 'apis.simple_note.update_note(note_id=1, title="Cake", access_token=token)'
FINISH = "apis.supervisor.complete_task()"
ANSWER = "apis.supervisor.complete_task(answer={})"
GOLD = {
    "aaaaaa1_1": [LOGIN, COUNT.format(tag="food"), ANSWER.format(2)],
    "aaaaaa1_2": [LOGIN, COUNT.format(tag="money"), ANSWER.format(3)],
    "bbbbbb1_1": [LOGIN, WRITE.format(title="Plan for Monday", content="Monday: tidy the desk"), FINISH],
    "bbbbbb1_2": [LOGIN, WRITE.format(title="Plan for Friday", content="Friday: tidy the desk"), FINISH],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("appworld")
    maker = Path(__file__).with_name("make_root.py")
    subprocess.run([PYTHON, "-I", "-B", maker, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def suite(root: Path) -> Iterator[AppWorldSuite]:
    made = envs.load("appworld", root=str(root), worlds=2, execution_timeout=3)
    assert isinstance(made, AppWorldSuite)
    yield made
    made.close()


def find(suite: AppWorldSuite, name: str) -> Task:
    return next(task for task in suite.tasks("train") if task.id == name)


async def episode(suite: AppWorldSuite, name: str, codes: Sequence[str]) -> tuple[list[str], Outcome]:
    """What each block led to, and the verdict."""
    environment = suite.make()
    try:
        await environment.reset(find(suite, name))
        read = []
        for code in codes:
            (message,), done = await environment.step({"role": "assistant", "content": f"So:\n{block(code)}"})
            read.append(message["content"])
            assert done == ("complete_task" in code)
        return read, await environment.outcome()
    finally:
        await environment.close()


def play(suite: AppWorldSuite, name: str, codes: Sequence[str]) -> tuple[list[str], Outcome]:
    return asyncio.run(episode(suite, name, codes))


@pytest.mark.parametrize("name", GOLD)
def test_gold_passes(suite: AppWorldSuite, name: str) -> None:
    _, outcome = play(suite, name, GOLD[name])
    assert outcome.reward == 1
    assert outcome.details["passed"] == outcome.details["tests"] > 1


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("aaaaaa1_1", [ANSWER.format(3)]),
        ("aaaaaa1_1", [FINISH]),
        ("bbbbbb1_1", [FINISH]),
        ("bbbbbb1_1", [LOGIN, WRITE.format(title="Plan for Monday", content="Monday: nothing"), FINISH]),
        ("bbbbbb1_1", []),  # cut off before anything was done
    ],
)
def test_wrong_and_nothing_done_fail(suite: AppWorldSuite, name: str, codes: list[str]) -> None:
    assert play(suite, name, codes)[1].reward == 0


@pytest.mark.parametrize("name", GOLD)
def test_gold_and_one_stray_write_fail(suite: AppWorldSuite, name: str) -> None:
    *work, end = GOLD[name]
    read, outcome = play(suite, name, [*work, STRAY, end])
    assert "failed" not in read[-2]
    assert outcome.reward == 0


def test_tgc_counts_tasks_and_sgc_whole_scenarios(suite: AppWorldSuite) -> None:
    tasks = suite.tasks("train")
    plans = {**GOLD, "bbbbbb1_2": [FINISH]}
    rollouts = [
        Rollout(t, [], [], [1], ids=[2], generated=[True], success=play(suite, t.id, plans[t.id])[1].success)
        for t in tasks
    ]
    figures = estimates.summarise(tasks, rollouts, {}, samples=1)
    assert (figures["tgc"], figures["sgc"]) == (0.75, 0.5)


def test_the_refuser_is_played_and_fails(suite: AppWorldSuite) -> None:
    tasks = suite.tasks("train")
    assert asyncio.run(evaluate.refuse(suite, tasks, 60)) == {task.id: 0.0 for task in tasks}


def test_siblings_of_one_task_share_nothing(suite: AppWorldSuite, root: Path) -> None:
    async def siblings() -> list[Outcome]:
        name = "bbbbbb1_1"
        both = [episode(suite, name, plan) for plan in (GOLD[name], [*GOLD[name][:2], STRAY, FINISH])]
        return [outcome for _, outcome in await asyncio.gather(*both)]

    assert [outcome.reward for outcome in asyncio.run(siblings())] == [1, 0]
    assert sorted(path.name for path in root.iterdir()) == ["data"], "an episode wrote into the user's root"


def test_a_policy_that_rewrites_the_evaluator_gains_nothing(suite: AppWorldSuite) -> None:
    hack = """
import appworld.evaluator
appworld.evaluator.TestTracker.success = property(lambda self: True)
appworld.evaluator.assert_plus = lambda *args, **kwargs: None
"""
    assert play(suite, "bbbbbb1_1", [hack, FINISH])[1].reward == 0


def test_ground_truth_is_not_where_the_code_runs(suite: AppWorldSuite, root: Path) -> None:
    look = "import pathlib\nprint(sorted(map(str, pathlib.Path('.').resolve().rglob('*'))))"
    peek = "import pathlib\nprint(pathlib.Path('data/tasks/aaaaaa1_1/ground_truth/answer.json').read_text())"
    where = "import os\nprint(dict(os.environ), pathlib.Path('data/base_dbs').resolve())"
    (found, peeked, told), _ = play(suite, "aaaaaa1_1", [look, peek, where])
    assert "specs.json" in found and "ground_truth" not in found
    assert "FileNotFoundError" in peeked
    assert str(root) not in found + told


def test_endless_and_wrong_code_are_observations(suite: AppWorldSuite) -> None:
    codes = ["while True: pass", "1 / 0", "x = 'a' * (64 << 30)", "import subprocess", "print('still here')"]
    read, _ = play(suite, "aaaaaa1_1", codes)
    for text, words in zip(read, ["timed out", "ZeroDivisionError", "MemoryError", "not allowed", "still here"]):
        assert words in text


@pytest.mark.parametrize(
    "code", ["import os\nos.abort()", "raise KeyboardInterrupt", "import os\nos.closerange(3, 99)"]
)
def test_code_that_ends_its_process_is_scored_though_the_work_was_done(suite: AppWorldSuite, code: str) -> None:
    rollout, _ = roll(suite, "bbbbbb1_1", [*map(block, GOLD["bbbbbb1_1"][:2]), block(code)])
    assert (rollout.reward, rollout.stop, rollout.messages[-1]["content"]) == (0.0, "crashed", CRASHED)


def test_code_that_breaks_nothing_goes_on(suite: AppWorldSuite) -> None:
    codes = ["raise SystemExit", "exit()", "def f(): f()\nf()", "raise MemoryError"]
    rollout, _ = roll(suite, "bbbbbb1_1", [*map(block, [*codes, *GOLD["bbbbbb1_1"]])])
    assert (rollout.reward, rollout.stop) == (1.0, "answer")


def test_the_clock_of_the_world_is_frozen_and_ours_runs(suite: AppWorldSuite) -> None:
    read, _ = play(suite, "aaaaaa1_1", ["import time\nprint(DateTime.now(), time.time())"] * 2)
    assert read[0] == read[1] and "2023-05-18" in read[0]


# Through a rollout, as a run plays it


class Script:
    """An engine that says given turns."""

    def __init__(self, renderer: Any, turns: Sequence[str]) -> None:
        self.renderer, self.turns = renderer, list(turns)

    async def generate(self, prompt_ids: Sequence[int], n: int, sampling: Sampling) -> list[Completion]:
        message: Message = {"role": "assistant", "content": self.turns.pop(0)}
        ids = self.renderer.turn(message)
        return [Completion(ids, [-0.5] * len(ids), "stop")]


def roll(suite: AppWorldSuite, name: str, turns: Sequence[str], **env: Any) -> tuple[Rollout, Any]:
    from tests.trainer.chat.test_chatml import make_tokenizer
    from trainer.chat.chatml import ChatMLRenderer

    renderer = ChatMLRenderer(make_tokenizer())
    settings = EnvConfig(**{"name": "appworld", "max_turns": 30, **env})
    setup = RolloutSetup(Script(renderer, turns), suite, renderer, Sampling(), settings, 100_000)
    return asyncio.run(play_episode(setup, find(suite, name))), renderer


def test_a_rollout_reads_what_the_benchmark_says_and_no_truth(suite: AppWorldSuite) -> None:
    turns = ["Let me think.", *map(block, GOLD["bbbbbb1_1"][:2]), f"{block(FINISH)}\n{block('1/0')}"]
    rollout, renderer = roll(suite, "bbbbbb1_1", turns)
    assert (rollout.reward, rollout.stop) == (1, "answer")
    read = [m["content"] for m in rollout.messages if m["role"] == "user"]
    assert read[0] == NO_CODE and "Note created" in read[2] and read[3].endswith(ONLY_FIRST)
    trace = json.dumps([describe(Group(rollout.task, [rollout]), [None], renderer.pieces), rollout.prompt_messages])
    (secret,) = (text for text in suite.answer_literals(rollout.task) if text.startswith("hidden"))
    assert secret not in trace and "ground_truth" not in trace and "assert" not in trace


def test_observations_are_cut_and_turns_are_counted(suite: AppWorldSuite) -> None:
    rollout, _ = roll(
        suite, "aaaaaa1_1", [block("print('x' * 100_000)")] * 3, max_turns=2, max_observation_chars=12_000
    )
    assert (rollout.stop, rollout.reward) == ("max_turns", 0)
    assert len(rollout.messages[1]["content"]) == 12_000
