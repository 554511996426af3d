"""The AppWorld adapter without the benchmark: the pool on real processes, the data folder, what the policy reads.

The processes are the real forker with a small world in it (`small_world.py`), which crashes, hangs and dawdles on
demand. tests/appworld has the benchmark itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.speed import cpu_seconds
from tests.trainer.test_chatml import make_tokenizer
from tests.trainer.test_real import ScriptedEngine
from trainer import envs
from trainer.chat.chatml import ChatMLRenderer
from trainer.config import EnvConfig
from trainer.envs.appworld import data, prompt
from trainer.envs.appworld.pool import Pool, WorldDied, WorldProcess, starved
from trainer.metrics import rollout_metrics
from trainer.rollout import run_group
from trainer.types import EnvironmentBroken, Group, Sampling, UserError

SMALL = Path(__file__).with_name("small_world.py")
PYTHON = Path(sys.executable)


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(PYTHON, SMALL, 2)
    yield made
    made.close()


def in_world(pool: Pool, use: Callable[[WorldProcess], Awaitable[Any]]) -> Any:
    async def episode() -> Any:
        await pool.enter()
        world = await pool.fork(pool.folder)
        try:
            return await use(world)
        finally:
            pool.discard(world, None)
            pool.leave()

    return asyncio.run(episode())


def say(text: str = "") -> Callable[[WorldProcess], Awaitable[Any]]:
    return lambda world: world.call("execute", code=f"say {text}")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(gone: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.02)
    return gone()


def test_every_episode_gets_a_process_that_ends_with_it(pool: Pool) -> None:
    async def two_steps(world: WorldProcess) -> Any:
        await world.call("execute", code="say")
        return await world.call("execute", code="say hi")

    one, other = in_world(pool, two_steps), in_world(pool, two_steps)
    assert one["steps"] == other["steps"] == 2  # nothing of the first is seen by the second
    assert one["output"] == "hi"
    assert one["pid"] != other["pid"] and one["parent"] == other["parent"]
    assert wait_until(lambda: not alive(one["pid"]) and not alive(other["pid"]))


def test_a_crash_breaks_its_episode_only(pool: Pool) -> None:
    with pytest.raises(EnvironmentBroken, match="the world's process died"):
        in_world(pool, lambda world: world.call("execute", code="crash"))
    assert in_world(pool, say("hi"))["output"] == "hi"


def test_what_a_world_raises_is_told(pool: Pool) -> None:
    with pytest.raises(EnvironmentBroken, match="execute: ValueError: no such note"):
        in_world(pool, lambda world: world.call("execute", code="raise no such note"))


def test_a_hang_ends_with_the_callers_patience_and_leaves_nothing(pool: Pool) -> None:
    async def hang(world: WorldProcess) -> int:
        pid = int((await world.call("execute", code="say"))["pid"])
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(world.call("execute", code="hang"), 0.3)
        return pid

    pid = in_world(pool, hang)
    assert wait_until(lambda: not alive(pid))
    assert in_world(pool, say("hi"))["output"] == "hi"


def test_slow_worlds_do_not_hold_others(pool: Pool) -> None:
    async def both() -> None:
        async def one(code: str) -> None:
            await pool.enter()
            world = await pool.fork(pool.folder)
            try:
                await world.call("execute", code=code)
            finally:
                pool.discard(world, None)
                pool.leave()

        slow = asyncio.create_task(one("hang"))
        await asyncio.wait_for(one("say"), 60)
        assert not slow.done()
        slow.cancel()
        await asyncio.wait([slow])

    asyncio.run(both())


def test_a_third_waits_for_its_place(pool: Pool) -> None:
    async def third() -> list[str]:
        order = []
        await pool.enter()
        await pool.enter()
        waiting = asyncio.create_task(pool.enter())
        await asyncio.sleep(0.1)
        order.append("waits" if not waiting.done() else "is in")
        pool.leave()
        await waiting
        order.append("is in")
        return order

    assert asyncio.run(third()) == ["waits", "is in"]
    assert in_world(pool, say("hi"))["output"] == "hi"  # a new loop starts with all places free


def test_a_dead_forker_is_replaced(pool: Pool) -> None:
    first = in_world(pool, say())
    os.kill(first["parent"], signal.SIGKILL)
    assert wait_until(lambda: not alive(first["parent"]))
    second = in_world(pool, say())
    assert second["parent"] != first["parent"]


def test_worlds_die_with_their_forker(pool: Pool) -> None:
    async def orphaned(world: WorldProcess) -> int:
        seen = await world.call("execute", code="say")
        os.kill(seen["parent"], signal.SIGKILL)
        with pytest.raises(EnvironmentBroken, match="died"):
            await world.call("execute", code="hang")
        return int(seen["pid"])

    pid = in_world(pool, orphaned)
    assert wait_until(lambda: not alive(pid))


def test_a_fork_that_nobody_waits_for_is_ended(pool: Pool) -> None:
    async def impatient() -> list[str]:
        await pool.enter()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pool.fork(pool.folder), 0)
        await asyncio.sleep(0)
        kept = await pool.fork(pool.folder)  # in order: by now the first has been ended
        parent = (await kept.call("execute", code="say"))["parent"]
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return [pid for pid in children if alive(int(pid))]

    assert len(asyncio.run(impatient())) == 1


ORPHAN = """
import asyncio, sys
from pathlib import Path
from trainer.envs.appworld.pool import Pool

async def main():
    pool = Pool(Path(sys.executable), Path(sys.argv[1]), 2)
    await pool.enter()
    idle, busy = await pool.fork(pool.folder), await pool.fork(pool.folder)
    one, other = await idle.call("execute", code="say"), await busy.call("execute", code="say")
    print(one["parent"], one["pid"], other["pid"], pool.folder, flush=True)
    await busy.call("execute", code="hang")

asyncio.run(main())
"""


def test_nothing_outlives_a_trainer_that_was_killed() -> None:
    trainer = subprocess.Popen([PYTHON, "-c", ORPHAN, str(SMALL)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout
    *pids, folder = trainer.stdout.readline().split()
    assert len(pids) == 3 and all(alive(int(pid)) for pid in pids) and Path(folder).is_dir()
    trainer.kill()
    trainer.wait()
    assert wait_until(lambda: not any(alive(int(pid)) for pid in pids))
    assert wait_until(lambda: not Path(folder).exists())


def test_the_token_is_asked_for(pool: Pool) -> None:
    async def stranger(world: WorldProcess) -> Any:
        return await WorldProcess("guess", world._port).call("execute", code="say hi")

    with pytest.raises(EnvironmentBroken, match="wrong token"):
        in_world(pool, stranger)


def test_worlds_listen_on_loopback_only(pool: Pool) -> None:
    async def listening(world: WorldProcess) -> list[str]:
        port = f":{world._port:04X}"
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [row[1] for row in rows if row[1].endswith(port) and row[3] == "0A"]

    (address,) = in_world(pool, listening)
    assert address.startswith("0100007F:")


def test_our_environment_stays_ours(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    names = in_world(pool, lambda world: world.call("execute", code="environment"))["output"].split(",")
    assert "PATH" in names
    assert not {"OPENAI_API_KEY", "APPWORLD_ROOT"} & set(names)


def test_a_greedy_policy_gets_a_memory_error(pool: Pool) -> None:
    assert in_world(pool, lambda world: world.call("execute", code="greedy"))["output"] == "MemoryError"


def test_a_world_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "world.py"
    broken.write_text("import no_such_benchmark\n")
    pool = Pool(PYTHON, broken, 1)
    for _ in range(2):  # and says so again: no place was lost
        with pytest.raises(EnvironmentBroken, match="No module named 'no_such_benchmark'"):
            asyncio.run(pool.enter())


def test_a_forker_that_dies_says_what_it_said_last(tmp_path: Path) -> None:
    broken = tmp_path / "world.py"
    broken.write_text("import os, sys\nprint('out of ink', file=sys.stderr, flush=True)\nos._exit(1)\n")
    with pytest.raises(EnvironmentBroken, match="died; it said last: out of ink"):
        asyncio.run(Pool(PYTHON, broken, 1).enter())


# Whose fault a death is


def play_out(tmp_path: Path, *blocks: str) -> tuple[Group, int]:
    """One sibling that says these blocks of code, each tried twice if it breaks, in worlds of `small_world.py`."""
    suite = load(tmp_path, root=str(make_root(tmp_path)))
    suite._pool = Pool(PYTHON, SMALL, 2, suite._pool._prepare)
    renderer = ChatMLRenderer(make_tokenizer())
    turns = [{"role": "assistant", "content": prompt.block(code)} for code in blocks]
    env = EnvConfig(name="appworld", max_turns=len(turns), timeout=60)
    task = suite.tasks("train")[0]
    try:
        engine = ScriptedEngine(renderer, [turns, turns])
        return asyncio.run(run_group(engine, suite, renderer, task, Sampling(), env, 100_000, 1))
    finally:
        suite.close()


@pytest.mark.parametrize("code", ["crash", "exit", "deep", "kill", "deaf", "gone"])
def test_code_that_ends_its_own_process_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """It is scored, so that a policy that is failing gains nothing by crashing."""
    monkeypatch.setattr("trainer.envs.appworld.pool.DEATH_SECONDS", 2.0)
    if code in ("kill", "gone") and starved() is None:
        pytest.skip("this kernel does not say whether it kills for lack of memory")
    group, broken = play_out(tmp_path, "say hi", code, "say never")
    (rollout,) = group.rollouts
    assert (broken, rollout.reward, rollout.stop) == (0, 0.0, "crashed")
    assert [m["content"] for m in rollout.messages[1:]] == ["Output:\nhi", prompt.block(code), prompt.CRASHED]
    assert rollout_metrics([group])["stop/crashed"] == 1


def test_an_episode_that_ends_well_is_judged(tmp_path: Path) -> None:
    group, _ = play_out(tmp_path, "done")
    assert [(r.reward, r.stop) for r in group.rollouts] == [(1.0, "answer")]


def test_a_death_with_the_forker_is_nobodys(tmp_path: Path) -> None:
    group, broken = play_out(tmp_path, "kill_forker")
    assert (group.rollouts, broken) == ([], 2)


@pytest.mark.parametrize("counts", [[0, 1], [None, None]], ids=["it did", "who knows"])
def test_a_kill_when_the_machine_is_out_of_memory_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: list[int | None]
) -> None:
    said = itertools.chain(counts * 2, itertools.repeat(counts[-1]))
    monkeypatch.setattr("trainer.envs.appworld.pool.starved", lambda: next(said))
    group, broken = play_out(tmp_path, "kill")
    assert (group.rollouts, broken) == ([], 2)


def test_a_death_between_two_blocks_is_nobodys(pool: Pool) -> None:
    async def outlived(world: WorldProcess) -> None:
        seen = await world.call("execute", code="say")
        os.kill(seen["pid"], signal.SIGTERM)
        assert wait_until(lambda: not alive(seen["pid"]))
        with pytest.raises(EnvironmentBroken, match="execute: the world's process died") as caught:
            await world.call("execute", code="say")
        assert not isinstance(caught.value, WorldDied)

    in_world(pool, outlived)


# The data folder


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


# What the policy reads and writes


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
    from tests.trainer import test_rollout, toy

    class Queued(toy.ParityEnvironment):
        async def open(self) -> None:
            self.log.append("open")
            await asyncio.sleep(2.5)

    class Suite(toy.ParitySuite):
        def make(self) -> Queued:
            return Queued(self.log, self.faults)

    suite = Suite()
    rollout = test_rollout.play(test_rollout.Script("w1 w2"), suite, timeout=2.0)
    assert rollout is not None and rollout.reward == 1
    assert suite.log[:2] == ["open", "reset"]
