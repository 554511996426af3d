"""The `check-env` command: plays an environment as training would, and names what its author has to mend.

Every line is about one promise of `trainer.protocols.Suite` and `Environment`. The episodes are scripted: no model is
needed. They replay gold solutions where the suite offers them, mistaken calls, and doing nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trainer import envs
from trainer.config import EnvConfig
from trainer.console import VisibleConsole
from trainer.data import Message, Outcome, Task, Tool
from trainer.envs.contract import CheckedSuite
from trainer.envs.tools import call
from trainer.errors import EnvironmentBroken, PolicyCrashed, UserError
from trainer.preflight.check import attempt, print_line
from trainer.preflight.probe import Skipped, require
from trainer.rollout.episode import Guarded, close_environment, make_environment, wait_until_open
from trainer.rollout.rewards import FULL_REWARD

TASKS = 5  # of each split that are played
LONGEST = 1.0  # seconds that one call may keep all other episodes waiting
GRACE = 2.0  # seconds in which a cancelled call has to end

Transcript = list[tuple[str, Any]]  # what the environment said, call by call


@dataclass
class EnvProbe:
    """The environment, and what the checks have found so far."""

    config: EnvConfig
    suite: CheckedSuite | None = None
    tasks: dict[str, list[Task]] = field(default_factory=dict)
    played: bool = False
    longest: tuple[float, str] = (0.0, "")  # seconds that a call held the event loop, and in which task

    @property
    def sample(self) -> list[Task]:
        return [task for tasks in self.tasks.values() for task in tasks[:TASKS]]


def check_env(config: EnvConfig) -> bool:
    """Run every check and print a line for each; return whether all is well."""
    console = VisibleConsole(highlight=False, soft_wrap=True)
    probe, failed = EnvProbe(config), 0
    for name, run in CHECKS.items():
        with _quiet():
            mark, lines = attempt(_reported(run), probe)
        failed += mark == "FAIL"
        for line in lines:
            print_line(console, mark, name, line)
    if failed:
        console.print(f"\n{config.name} is not ready: see the lines marked FAIL", markup=False)
    else:
        console.print(f"\n{config.name} is ready: env.name: {config.name}", markup=False)
    return not failed


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of the trainer: the lines of the report say the same."""
    logger = logging.getLogger("trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reported(run: Callable[[EnvProbe], str]) -> Callable[[EnvProbe], str]:
    """The check, with a fault of the environment as the line that its author reads."""

    def check(probe: EnvProbe) -> str:
        try:
            return run(probe)
        except EnvironmentBroken as error:
            raise UserError(str(error)) from None

    return check


class Episode:
    """One scripted episode that keeps what the environment says."""

    def __init__(self, probe: EnvProbe, task: Task) -> None:
        self._probe, self._task, self._timeout = probe, task, probe.config.timeout
        self._environment = make_environment(require(probe.suite, "import"), self._timeout)
        self.calls = Guarded(self._environment, self._timeout)
        self.said: Transcript = []
        self.tools: list[Tool] = []
        self.over = False

    async def begin(self) -> None:
        await wait_until_open(self._environment)
        messages, self.tools = await self.calls.reset(self._task)
        self.said.append(("reset", [messages, self.tools]))

    async def step(self, message: Message) -> None:
        if self.over:
            return
        try:
            messages, self.over = await self.calls.step(message)
        except PolicyCrashed as crash:
            messages, self.over = [{"crashed": str(crash)}], True
        self.said.append(("step", [messages, self.over]))

    async def finish(self) -> Outcome:
        outcome = await self.calls.outcome()
        self.said.append(("outcome", [float(outcome.reward), outcome.success, outcome.reason]))
        return outcome

    async def close(self) -> None:
        await self.calls.close()
        self._probe.longest = max(self._probe.longest, (self.calls.longest, self._task.id))

    async def abandon(self) -> None:
        """Close it after a fault, which must not be hidden by one of `close`."""
        await close_environment(self._environment, self._timeout)


async def play(probe: EnvProbe, task: Task, script: Callable[[Episode], Sequence[Message]]) -> tuple[Outcome, Episode]:
    """Play the messages that `script` gives for the episode; the environment is closed whatever happens."""
    episode = Episode(probe, task)
    try:
        await episode.begin()
        for message in script(episode):
            await episode.step(message)
        outcome = await episode.finish()
    except BaseException:
        await episode.abandon()
        raise
    await episode.close()
    return outcome, episode


def succeeded(outcome: Outcome) -> bool:
    return bool(outcome.reward >= FULL_REWARD if outcome.success is None else outcome.success)


def useful(probe: EnvProbe, task: Task) -> Callable[[Episode], Sequence[Message]]:
    """The gold solution where there is one, else a call of every tool and then words."""
    suite = require(probe.suite, "import")
    if suite.has_gold:
        return _always(suite.gold(task))
    return lambda episode: [*(guess(tool) for tool in episode.tools), suite.refusal()]


def _always(messages: list[Message]) -> Callable[[Episode], Sequence[Message]]:
    return lambda episode: messages


def guess(tool: Tool) -> Message:
    """A call with an argument for everything that the schema requires."""
    schema = tool["function"].get("parameters") or {}
    values = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
    wanted = {name: schema.get("properties", {}).get(name, {}) for name in schema.get("required", [])}
    return call(
        tool["function"]["name"],
        **{name: (kind.get("enum") or [values.get(str(kind.get("type")), "x")])[0] for name, kind in wanted.items()},
    )


def mistakes(tool: Tool) -> list[Message]:
    """Calls that a policy makes: of what is not there, without arguments, with others, with other types."""
    name, right = tool["function"]["name"], guess(tool)
    arguments = json.loads(right["tool_calls"][0]["function"]["arguments"])
    return [
        right,
        call(name),
        call(name, no_such_argument=1),
        *(call(name, **{**arguments, one: None}) for one in arguments),
    ]


def check_import(probe: EnvProbe) -> str:
    suite = envs.load(probe.config.name, **probe.config.options)
    assert isinstance(suite, CheckedSuite)
    probe.suite = suite
    return f"{suite.name}: {', '.join(f'{split} {size}' for split, size in suite.splits.items())}"


def check_tasks(probe: EnvProbe) -> str:
    """Ids are unique over all splits, and the same tasks come again."""
    suite = require(probe.suite, "import")
    where: dict[str, str] = {}
    found: dict[str, list[Task]] = {}
    for split in suite.splits:
        found[split] = suite.tasks(split)
        for task in found[split]:
            if task.id in where:
                raise UserError(
                    f"{suite.plugin}: tasks: {task.id!r} is in {where[task.id]} and in {split}, needs an id for each"
                )
            where[task.id] = split
        if [task.id for task in suite.tasks(split)] != [task.id for task in found[split]]:
            raise UserError(f"{suite.plugin}: tasks({split!r}) gave other tasks when asked again, needs the same")
    if not where:
        raise UserError(f"{suite.plugin}: tasks: there are none, needs at least one")
    probe.tasks = found
    literals = sum(len(suite.answer_literals(task)) for task in probe.sample)
    return f"{len(where)} tasks, ids unique; {literals} answer literals in the first {len(probe.sample)}"


def check_nothing_done(probe: EnvProbe) -> str:
    """Refusing is scored, and is no success but where nothing is to be done."""
    require(probe.tasks, "tasks")
    suite = require(probe.suite, "import")

    async def each() -> None:
        for task in probe.sample:
            outcome, _ = await play(probe, task, _always([suite.refusal()] * probe.config.max_turns))
            if succeeded(outcome) and task.task_class != "no_action":
                raise UserError(
                    f"{suite.plugin}: outcome: refusing {task.id} is a success; needs a reward below {FULL_REWARD:g} "
                    "or Outcome(success=False), or task_class no_action"
                )

    asyncio.run(each())
    probe.played = True
    return f"{len(probe.sample)} tasks refused and scored, none a success"


def check_gold(probe: EnvProbe) -> str:
    require(probe.played, "nothing done")
    suite = require(probe.suite, "import")
    if not suite.has_gold:
        raise Skipped("the suite offers no gold(task), which would show that its tasks can be solved")

    async def each() -> None:
        for task in probe.sample:
            outcome, _ = await play(probe, task, useful(probe, task))
            if not succeeded(outcome):
                why = f", reason {outcome.reason!r}" if outcome.reason else ""
                raise UserError(f"{suite.plugin}: outcome: gold of {task.id} fails (reward {outcome.reward:g}{why})")

    asyncio.run(each())
    return f"{len(probe.sample)} gold solutions succeed"


def check_mistakes(probe: EnvProbe) -> str:
    """A mistaken call is answered; it is not a fault of the environment."""
    require(probe.played, "nothing done")
    task, count = probe.sample[0], 0
    _, episode = asyncio.run(play(probe, task, lambda episode: []))
    for tool in episode.tools:
        for wrong in mistakes(tool):
            asyncio.run(play(probe, task, _always([wrong])))
            count += 1
    return f"{count} mistaken calls of {len(episode.tools)} tools are answered"


def check_determinism(probe: EnvProbe) -> str:
    require(probe.played, "nothing done")
    suite, first = require(probe.suite, "import"), [tasks[0] for tasks in probe.tasks.values() if tasks]
    for task in first:
        script = useful(probe, task)
        one, two = (asyncio.run(play(probe, task, script))[1].said for _ in range(2))
        _same(
            suite.plugin, one, two, f"{task.id}: the same messages twice", "the same (seed what is random by the task)"
        )
    return "the same messages twice give the same observations and outcome"


def check_two_at_once(probe: EnvProbe) -> str:
    """Two episodes of one task, turn by turn: one solves it, the other refuses, and each goes as it would alone."""
    require(probe.played, "nothing done")
    suite = require(probe.suite, "import")
    task, other = probe.sample[0], probe.sample[-1]

    async def together() -> list[Transcript]:
        scripts = [useful(probe, task), lambda episode: [suite.refusal()], useful(probe, other)]
        episodes = [Episode(probe, task), Episode(probe, task), Episode(probe, other)]
        try:
            await asyncio.gather(*(episode.begin() for episode in episodes))
            turns = [list(script(episode)) for script, episode in zip(scripts, episodes)]
            for i in range(max(map(len, turns))):
                for episode, messages in zip(episodes, turns):
                    if i < len(messages):
                        await episode.step(messages[i])
            for episode in episodes:
                await episode.finish()
            return [episode.said for episode in episodes]
        finally:
            for episode in episodes:
                await episode.abandon()

    async def alone() -> list[Transcript]:
        scripts = [
            (task, useful(probe, task)),
            (task, lambda episode: [suite.refusal()]),
            (other, useful(probe, other)),
        ]
        return [(await play(probe, one, script))[1].said for one, script in scripts]

    for one, two in zip(asyncio.run(alone()), asyncio.run(together())):
        _same(
            suite.plugin, one, two, "an episode beside others", "what it says alone (keep state in what make() returns)"
        )
    return "three episodes, turn by turn, go as each goes alone"


def _same(plugin: str, one: Transcript, two: Transcript, what: str, needs: str) -> None:
    for (method, first), (_, second) in zip(one, two):
        if first != second:
            raise UserError(
                f"{plugin}: {method} differs for {what}: {_short(first)} and {_short(second)}; needs {needs}"
            )
    if len(one) != len(two):
        raise UserError(f"{plugin}: step ends the episode earlier for {what}; needs {needs}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 120 else text[:117] + "..."


def check_time_out(probe: EnvProbe) -> str:
    """A call that is cut short ends soon, its environment closes, and the next episode is not disturbed."""
    require(probe.played, "nothing done")
    suite, task, waits = require(probe.suite, "import"), probe.sample[0], []

    async def cut_short(method: str) -> None:
        environment = make_environment(suite, probe.config.timeout)
        guarded = Guarded(environment, probe.config.timeout)
        try:
            await wait_until_open(environment)
            if method == "step":
                await guarded.reset(task)
            pending = environment.step(suite.refusal()) if method == "step" else environment.reset(task)
            running: asyncio.Task[Any] = asyncio.ensure_future(pending)
            await asyncio.sleep(0)
            if running.done():
                await running
                return
            waits.append(method)
            running.cancel()
            done, _ = await asyncio.wait([running], timeout=GRACE)
            if not done:
                raise UserError(
                    f"{suite.plugin}: {method} goes on for {GRACE:g} s after it was cancelled, needs to end"
                )
            if not running.cancelled() and running.exception() is None:
                raise UserError(f"{suite.plugin}: {method} swallows asyncio.CancelledError, needs to let it through")
        finally:
            await guarded.close()

    for method in ("reset", "step"):
        _run(cut_short(method))
    asyncio.run(play(probe, task, useful(probe, task)))
    return f"{' and '.join(waits)} can be cut short" if waits else "nothing to cut short: reset and step never wait"


def _run(main: Awaitable[None]) -> None:
    """`asyncio.run`, without waiting for what does not end."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main)
    finally:
        if not any(not task.done() for task in asyncio.all_tasks(loop)):
            loop.close()


def check_close(probe: EnvProbe) -> str:
    """An environment closes before `reset`, after it, and after a crash in the middle of an episode."""
    require(probe.played, "nothing done")
    suite, task = require(probe.suite, "import"), probe.sample[0]

    async def closes(begun: int) -> None:
        environment = make_environment(suite, probe.config.timeout)
        guarded = Guarded(environment, probe.config.timeout)
        if begun:
            await wait_until_open(environment)
            await guarded.reset(task)
        if begun > 1:
            await guarded.step(suite.refusal())
        try:
            await guarded.close()
        except EnvironmentBroken as error:
            when = ("before reset", "after reset", "after a step")[begun]
            raise UserError(f"{error}, when closed {when}") from None

    for begun in range(3):
        asyncio.run(closes(begun))
    asyncio.run(play(probe, task, useful(probe, task)))
    return "closes before reset, after it and in the middle of an episode; the next one plays"


def check_event_loop(probe: EnvProbe) -> str:
    require(probe.played, "nothing done")
    (seconds, task), plugin = probe.longest, require(probe.suite, "import").plugin
    if seconds > LONGEST:
        raise UserError(
            f"{plugin}: a call in {task} held the event loop for {seconds:.1f} s, in which every other episode "
            "waits; needs `await asyncio.to_thread(...)` around blocking work"
        )
    return f"a call keeps other episodes waiting for {1000 * seconds:.0f} ms at most"


CHECKS: dict[str, Callable[[EnvProbe], str]] = {
    "import": check_import,
    "tasks": check_tasks,
    "nothing done": check_nothing_done,
    "gold": check_gold,
    "mistakes": check_mistakes,
    "determinism": check_determinism,
    "two at once": check_two_at_once,
    "time-out": check_time_out,
    "close": check_close,
    "event loop": check_event_loop,
}
