"""AppWorld's worlds in processes of their own: they are isolated, they end, and their deaths are attributed."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.byte_policy import ScriptedEngine
from tests.trainer.chat.test_chatml import make_tokenizer
from tests.trainer.envs.test_appworld_suite import load, make_root
from trainer.chat.chatml import ChatMLRenderer
from trainer.config import EnvConfig
from trainer.data import Group, Sampling
from trainer.envs.appworld import prompt
from trainer.envs.appworld.pool import Pool, WorldDied, WorldProcess, starved
from trainer.errors import EnvironmentBroken
from trainer.randomness import SEED
from trainer.records.rollout_metrics import rollout_metrics
from trainer.rollout.episode import RolloutSetup
from trainer.rollout.siblings import run_group

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


def test_a_fork_without_a_waiter_is_killed(pool: Pool) -> None:
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


def test_a_forker_that_dies_quotes_its_last_line(tmp_path: Path) -> None:
    broken = tmp_path / "world.py"
    broken.write_text("import os, sys\nprint('out of ink', file=sys.stderr, flush=True)\nos._exit(1)\n")
    with pytest.raises(EnvironmentBroken, match="died; its last line: out of ink"):
        asyncio.run(Pool(PYTHON, broken, 1).enter())


def play_out(tmp_path: Path, *blocks: str) -> Group:
    """One sibling that says these blocks of code, each tried twice if it breaks, in worlds of `small_world.py`."""
    suite = load(tmp_path, root=str(make_root(tmp_path)))
    suite._suite._pool = Pool(PYTHON, SMALL, 2, suite._pool._prepare)  # of the suite that the checks wrap
    renderer = ChatMLRenderer(make_tokenizer())
    turns = [{"role": "assistant", "content": prompt.block(code)} for code in blocks]
    env = EnvConfig(name="appworld", max_turns=len(turns), timeout=60)
    task = suite.tasks("train")[0]
    try:
        engine = ScriptedEngine(renderer, [turns, turns])
        return asyncio.run(run_group(RolloutSetup(engine, suite, renderer, Sampling(), env, 100_000), task, 1))
    finally:
        suite.close()


@pytest.mark.parametrize("code", ["crash", "exit", "deep", "kill", "deaf", "gone"])
def test_code_that_ends_its_own_process_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """It is scored, so that a policy that is failing gains nothing by crashing."""
    monkeypatch.setattr("trainer.envs.appworld.pool.DEATH_SECONDS", 2.0)
    if code in ("kill", "gone") and starved() is None:
        pytest.skip("this kernel does not say whether it kills for lack of memory")
    group = play_out(tmp_path, "say hi", code, "say never")
    (rollout,) = group.rollouts
    assert (group.broken, rollout.reward, rollout.stop) == (0, 0.0, "crashed")
    assert [m["content"] for m in rollout.messages[1:]] == ["Output:\nhi", prompt.block(code), prompt.CRASHED]
    assert rollout_metrics([group])["stop/crashed"] == 1


def test_an_episode_that_ends_well_is_judged(tmp_path: Path) -> None:
    group = play_out(tmp_path, "done")
    assert [(r.reward, r.stop) for r in group.rollouts] == [(1.0, "answer")]


def test_a_death_with_the_forker_breaks_the_environment(tmp_path: Path) -> None:
    group = play_out(tmp_path, "kill_forker")
    assert (group.rollouts, group.broken) == ([], 2)


@pytest.mark.parametrize("counts", [[0, 1], [None, None]], ids=["it did", "who knows"])
def test_an_out_of_memory_kill_breaks_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: list[int | None]
) -> None:
    said = itertools.chain(counts * 2, itertools.repeat(counts[-1]))
    monkeypatch.setattr("trainer.envs.appworld.pool.starved", lambda: next(said))
    group = play_out(tmp_path, "kill")
    assert (group.rollouts, group.broken) == ([], 2)


def test_a_death_between_two_blocks_breaks_the_environment(pool: Pool) -> None:
    async def outlived(world: WorldProcess) -> None:
        seen = await world.call("execute", code="say")
        os.kill(seen["pid"], signal.SIGTERM)
        assert wait_until(lambda: not alive(seen["pid"]))
        with pytest.raises(EnvironmentBroken, match="execute: the world's process died") as caught:
            await world.call("execute", code="say")
        assert not isinstance(caught.value, WorldDied)

    in_world(pool, outlived)


def test_every_world_begins_from_the_seed_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for seed in ("7", "7", "8"):
        monkeypatch.setenv(SEED, seed)
        made = Pool(PYTHON, SMALL, 2)
        worlds = {in_world(made, lambda world: world.call("execute", code="random"))["output"] for _ in range(2)}
        made.close()
        assert len(worlds) == 1, "whichever worlds were forked before"
        drawn += worlds
    assert drawn[0] == drawn[1] != drawn[2]
