"""Runs that are killed, refused by the disk, signalled and damaged resume to the same bits, or end in one line.

The scenario is a run with evaluations, traces and a limit of one checkpoint, whose writer fails in step 3, so that the
checkpoint of step 2 is written twice; the same command then finishes it. `make test-chaos` sweeps every event; without
it a sample is tried.
"""

from __future__ import annotations

import errno
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.chaos import harness
from tests.trainer.chaos.harness import FAIL, FAIL_FROM, KILL, NONE, SIGNAL, Ended, Fault, Runs, copy, differences, left

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
PARTS = range(8)  # of a sweep: pytest-xdist runs them side by side


class Scenario:
    """The whole run, what it left, and which events are worth a fault."""

    def __init__(self, root: Path) -> None:
        self.runs = Runs(root)
        ended = self.play(root / "whole")
        assert ended.code == 0, ended.said
        self.whole = left(root / "whole")
        self.events = [self.kind_and_name(line) for line in ended.events]
        self.points = [k for k in range(1, len(self.events) + 1) if not self.inside_a_file(k)]

    def play(self, run: Path, fault: Fault = NONE) -> Ended:
        return self.runs.train(run, fault, times=2, writer_fails_at=3)

    def resume(self, run: Path) -> Ended:
        return self.runs.train(run)

    @staticmethod
    def kind_and_name(line: str) -> tuple[int, str]:
        kind, _, name = line.partition(" ")
        return int(kind), name

    def inside_a_file(self, k: int) -> bool:
        """Whether the k-th event is a write between two writes of the same file."""
        around = self.events[max(k - 2, 0) : k + 1]
        return len(around) == 3 and len(set(around)) == 1 and around[0][0] == harness.WRITE

    def points_of(self, *kinds: int) -> list[int]:
        return [k for k in self.points if self.events[k - 1][0] in kinds]

    def assert_same(self, run: Path, after: str) -> None:
        ended = self.resume(run)
        assert ended.code == 0, (after, ended.said)
        assert not differences(self.whole, left(run)), after


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    made = Scenario(tmp_path_factory.mktemp("chaos"))
    yield made
    made.runs.close()


def kill(scenario: Scenario, run: Path, k: int) -> None:
    ended = scenario.play(run, Fault(KILL, k))
    assert ended.code == -signal.SIGKILL, ended.said
    scenario.assert_same(run, f"killed at {k}: {scenario.events[k - 1]}")


def fail(scenario: Scenario, run: Path, k: int, mode: int, number: int, kinds: int) -> None:
    """The disk refuses the k-th event of `kinds`, or all from there on; then it is mended."""
    ended = scenario.play(run, Fault(mode, k, number, kinds))
    ended.check_lines()
    scenario.assert_same(run, f"{errno.errorcode[number]} at {k}: {ended.said}")


def stop(scenario: Scenario, run: Path, k: int, number: int) -> None:
    ended = scenario.play(run, Fault(SIGNAL, k, number))
    ended.check_lines()
    assert ended.code in (0, 128 + number), (k, ended.said)  # 0: it came when the run was ending anyway
    scenario.assert_same(run, f"signal {number} at {k}: {scenario.events[k - 1]}")


def sample(points: list[int], n: int) -> list[int]:
    return sorted(random.sample(points, min(n, len(points))))


FAULTS = {  # name -> how long it lasts, errno, what it refuses
    "full": (FAIL_FROM, errno.ENOSPC, harness.CREATE | harness.WRITE | harness.MKDIR | harness.SYNC),
    "broken": (FAIL, errno.EIO, harness.CHANGES),
    "read-only": (FAIL_FROM, errno.EROFS, harness.CHANGES),
    "denied": (FAIL, errno.EACCES, harness.CREATE | harness.MKDIR | harness.RENAME | harness.REMOVE),
    "too many files": (FAIL_FROM, errno.EMFILE, harness.CREATE | harness.READ),
}


def points_of_fault(scenario: Scenario, run: Path, kinds: int) -> list[int]:
    """Where a fault of these kinds may happen; its events are counted apart."""
    ended = scenario.play(run, Fault(kinds=kinds))
    events = [scenario.kind_and_name(line) for line in ended.events]
    shutil.rmtree(run)
    same = [a == b == c for a, b, c in zip(events, events[1:], events[2:])]
    return [k for k in range(1, len(events) + 1) if k in (1, len(events)) or not same[k - 2]]


def test_a_kill_between_renames_loses_nothing(scenario: Scenario, tmp_path: Path) -> None:
    """Of the step that is saved twice: its second checkpoint takes the place of the first by two renames."""
    again = [k for k in scenario.points_of(harness.RENAME) if scenario.events[k - 1][1].endswith("step_2")]
    assert len(again) >= 3
    for k in again:
        kill(scenario, tmp_path / str(k), k)


def test_kills_anywhere(scenario: Scenario, tmp_path: Path) -> None:
    for k in sample(scenario.points, 3):
        kill(scenario, tmp_path / str(k), k)


@pytest.mark.parametrize("name", FAULTS)
def test_a_disk_that_refuses(scenario: Scenario, tmp_path: Path, name: str) -> None:
    mode, number, kinds = FAULTS[name]
    for k in sample(points_of_fault(scenario, tmp_path / "count", kinds), 1):
        fail(scenario, tmp_path / str(k), k, mode, number, kinds)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_anywhere(scenario: Scenario, tmp_path: Path, number: int) -> None:
    for k in sample(scenario.points, 1):
        stop(scenario, tmp_path / str(k), k, number)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_kill_at_every_event(scenario: Scenario, tmp_path: Path, part: int) -> None:
    for k in scenario.points[part :: len(PARTS)]:
        kill(scenario, tmp_path / str(k), k)
        shutil.rmtree(tmp_path / str(k))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", FAULTS)
def test_refusals_over_all_events(scenario: Scenario, tmp_path: Path, name: str, part: int) -> None:
    mode, number, kinds = FAULTS[name]
    points = points_of_fault(scenario, tmp_path / "count", kinds)
    stride = len(PARTS) * {"broken": 1, "full": 2}.get(name, 4)  # any call may give EIO
    for k in points[part::stride]:
        fail(scenario, tmp_path / str(k), k, mode, number, kinds)
        shutil.rmtree(tmp_path / str(k))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_signal_at_every_tenth_event(scenario: Scenario, tmp_path: Path, part: int) -> None:
    for k in scenario.points[part :: 10 * len(PARTS)]:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            stop(scenario, tmp_path / f"{k}-{number}", k, number)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: random.randrange(max(len(data), 1))])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flip": flip,
    "truncate": truncate,
    "empty": empty,
    "delete": Path.unlink,
    "replace": replace,
}


@pytest.fixture(scope="module")
def stopped(scenario: Scenario) -> Path:
    """A run of two steps that wants a third."""
    run = scenario.runs.root / "stopped"
    ended = scenario.runs.train(run, more=["--max_steps", "2", "--save_total_limit", "2"])
    assert ended.code == 0, ended.said
    return run


def damaged(scenario: Scenario, stopped: Path, run: Path, name: str, kind: str) -> None:
    """Damage one file; the run goes on to the same bits, or ends in one line and does so when the file is put back."""
    copy(stopped, run)
    DAMAGES[kind](run / name)
    ended = scenario.resume(run)
    ended.check_lines()
    if ended.code:
        if (run / name).is_dir():
            (run / name).rmdir()
        shutil.copy2(stopped / name, run / name)
        scenario.assert_same(run, f"{kind} {name}: {ended.said}")
        return
    found = left(run)
    different = differences(scenario.whole, found)
    record = name.startswith(("metrics", "rollouts"))  # damage to a record cannot be undone, and harms nothing else
    assert not set(different) - ({"metrics", "traces"} if record else set()), (name, kind, different)
    if name.startswith("checkpoints/step_2/"):
        assert re.search(r"^WARNING: resumes from .*step_1, .* step_2 \(.*\) is now damaged-step_2$", ended.said, re.M)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_what_cannot_be_read(scenario: Scenario, stopped: Path, tmp_path: Path, number: int) -> None:
    unreadable(scenario, stopped, tmp_path / "run", number, sample)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_everything_that_cannot_be_read(scenario: Scenario, stopped: Path, tmp_path: Path, number: int) -> None:
    unreadable(scenario, stopped, tmp_path / "run", number, lambda points, n: points)


def unreadable(
    scenario: Scenario, stopped: Path, run: Path, number: int, choose: Callable[[list[int], int], list[int]]
) -> None:
    """A resume that may not read something ends in one line and takes nothing for gone or damaged."""
    ended = scenario.runs.train(copy(stopped, run), Fault(kinds=harness.READ))
    for k in choose(list(range(1, len(ended.events) + 1)), 2):
        copy(stopped, run)
        ended = scenario.runs.train(run, Fault(FAIL, k, number, harness.READ))
        ended.check_lines()
        assert "damaged" not in ended.said and "gone" not in ended.said, (k, ended.said)
        scenario.assert_same(run, f"{errno.errorcode[number]} at read {k}: {ended.said}")


def names(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file(scenario: Scenario, stopped: Path, tmp_path: Path, kind: str) -> None:
    for name in random.sample(names(stopped), 2):
        damaged(scenario, stopped, tmp_path / "run", name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damaged_file(scenario: Scenario, stopped: Path, tmp_path: Path, kind: str) -> None:
    for name in names(stopped):
        damaged(scenario, stopped, tmp_path / "run", name, kind)
