"""One episode: a prompt, then {generate, parse, observe} until the policy, the environment or a limit ends it.

A mistake of the policy becomes an observation that names it. A fault of the environment, or of our own code on what was
said, drops the rollout: it is counted, and never scored 0. Tokens are appended as they were sampled; text is never
tokenised again.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.concurrency import Blocked, Interruptible, interrupted_after
from trainer.data import Completion, Message, Outcome, Rollout, Sampling, Task, TokenClass, Tool
from trainer.errors import EnvironmentBroken, EnvironmentBug, PolicyCrashed, PromptTooLong, RolloutBug
from trainer.protocols import Engine, Environment, Renderer, Suite
from trainer.rollout.rewards import Grading
from trainer.text import encodable, encodable_data

if TYPE_CHECKING:
    from trainer.config import EnvConfig

log = logging.getLogger(__name__)
CUT = " ...[cut]"
T = TypeVar("T")


@dataclass(frozen=True)
class RolloutSetup:
    """What all episodes of a run share."""

    engine: Engine
    suite: Suite
    renderer: Renderer
    sampling: Sampling
    env: EnvConfig
    max_length: int  # tokens of prompt and response
    grading: Grading = field(default_factory=Grading)


async def play_episode(setup: RolloutSetup, task: Task, rollout: Rollout | None = None) -> Rollout:
    """Play one episode, into `rollout` if it is given. The environment is closed whatever happens.

    Raises:
        RolloutBug: our own code failed on what was said; `rollout` tells how far it came.
        EnvironmentBroken: the environment or a reward function failed, or took longer than `env.timeout`.
        PromptTooLong: the first prompt leaves no room for an answer within `max_length`.
    """
    environment = None
    try:
        environment = make_environment(setup.suite, setup.env.timeout)
        await wait_until_open(environment)
        rollout = Rollout(task, [], [], []) if rollout is None else rollout
        return await _Episode(setup, Guarded(environment, setup.env.timeout), setup.max_length).play(rollout)
    finally:
        if environment is not None:
            await close_environment(environment, setup.env.timeout)


def make_environment(suite: Suite, timeout: float) -> Environment:
    """One environment of the suite, within `timeout` seconds."""
    try:
        with interrupted_after(timeout):
            return suite.make()
    except EnvironmentBroken:
        raise
    except Blocked:
        raise EnvironmentBroken(_blocked(suite, "make", timeout)) from None
    except (Exception, SystemExit) as error:
        raise EnvironmentBug(f"make: {error!r}") from error


async def wait_until_open(environment: Environment) -> None:
    """Let the environment wait for its place, if it has to."""
    if wait := getattr(environment, "open", None):
        await wait()


async def close_environment(environment: Environment, timeout: float) -> None:
    """Close it; a failure is logged only."""
    try:
        await Guarded(environment, timeout).close()
    except Exception as error:  # the episode is over: nothing is lost but the clean-up
        log.warning("an environment did not close: %s", error)


class Guarded:
    """An environment whose failures, hangs included, are all `EnvironmentBroken`; `PolicyCrashed` passes through.

    What it says is made encodable here, and is JSON: else it could not be written to the run's files later on.
    """

    def __init__(self, environment: Environment, timeout: float) -> None:
        self._environment, self._timeout = environment, timeout
        self.longest = 0.0  # seconds that a call kept all other episodes waiting

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        return await self._guard("reset", lambda: self._json_of(self._environment.reset(task)))

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        return await self._guard("step", lambda: self._json_of(self._environment.step(message)))

    async def outcome(self) -> Outcome:
        return await self._guard("outcome", lambda: self._judged(self._environment.outcome()))

    @staticmethod
    async def _judged(call: Awaitable[Outcome]) -> Outcome:
        outcome = await call
        success = None if outcome.success is None else bool(outcome.success)  # NumPy's are no JSON
        return replace(outcome, success=success, reason=encodable(str(outcome.reason)))

    @staticmethod
    async def _json_of(call: Awaitable[tuple[list[Message], T]]) -> tuple[list[Message], T]:
        messages, other = await call
        messages, other = encodable_data(messages), encodable_data(other)
        json.dumps([messages, other], allow_nan=False)
        return messages, other

    async def close(self) -> None:
        await self._guard("close", self._environment.close)

    async def _guard(self, method: str, function: Callable[[], Awaitable[T]]) -> T:
        try:
            call = Interruptible(_without_exit(function()), self._timeout)
            try:
                return await asyncio.wait_for(call, self._timeout)
            finally:
                self.longest = max(self.longest, call.longest)
        except asyncio.TimeoutError:
            waits_for = getattr(self._environment, "waits_for", "")
            reason = f", waiting for {waits_for}" if waits_for else ""
            what = f"{_named(self._environment, method)} took longer than env.timeout = {self._timeout:g} s{reason}"
            raise EnvironmentBroken(what) from None
        except Blocked:
            raise EnvironmentBroken(_blocked(self._environment, method, self._timeout)) from None
        except (EnvironmentBroken, PolicyCrashed):
            raise
        except Exception as error:
            fault = EnvironmentBroken if isinstance(error, OSError) else EnvironmentBug  # a lost connection is no bug
            raise fault(f"{_named(self._environment, method)}: {error!r}") from error


def _named(thing: Environment | Suite, method: str) -> str:
    """The method, and before it the plug-in where its name is known."""
    plugin = getattr(thing, "plugin", "")
    return f"{plugin}: {method}" if plugin else method


def _blocked(thing: Environment | Suite, method: str, seconds: float) -> str:
    remedy = (
        "needs `await asyncio.to_thread(...)` around blocking work" if method != "make" else "needs `open` for that"
    )
    return f"{_named(thing, method)} held the event loop for env.timeout = {seconds:g} s; {remedy}"


async def _without_exit(call: Awaitable[T]) -> T:
    """An exit() within an environment ends the rollout, not the run; the event loop would pass it on to everybody."""
    try:
        return await call
    except SystemExit as error:
        raise RuntimeError(f"exit({error.code!r})") from error


@dataclass
class _Episode:
    setup: RolloutSetup
    environment: Guarded
    max_length: int  # tokens of prompt and response; `env.max_response_tokens` may lower it
    crash: PolicyCrashed | None = None

    async def play(self, rollout: Rollout) -> Rollout:
        task = rollout.task
        messages, tools = await self.environment.reset(task)
        rollout.prompt_messages, rollout.tools = messages, tools
        with _own_code("rendering the prompt"):
            rollout.prompt_ids = prompt = self.setup.renderer.prompt(messages, tools)
        if len(prompt) >= self.max_length:
            raise PromptTooLong(
                f"model.max_length: {self.max_length} tokens, but the prompt of task {task.id} has {len(prompt)}"
            )
        if self.setup.env.max_response_tokens is not None:
            self.max_length = min(self.max_length, len(prompt) + self.setup.env.max_response_tokens)
        for turn in range(self.setup.env.max_turns):
            if await self._turn(rollout, turn):
                break
        if self.crash is None:
            outcome = await self.environment.outcome()
        else:  # there is nothing left to ask
            outcome = Outcome(self.crash.reward, success=False, reason="crashed")
        await self.setup.grading.grade(rollout, outcome, self.setup.env.timeout)
        return rollout

    async def _turn(self, rollout: Rollout, turn: int) -> bool:
        """Play one assistant turn; return whether the episode is over, with the reason in `rollout.stop`."""
        context = rollout.prompt_ids + rollout.ids
        room = min(self.setup.sampling.max_tokens, self.max_length - len(context))
        (completion,) = await self.setup.engine.generate(context, 1, replace(self.setup.sampling, max_tokens=room))
        self._append_generated(rollout, completion, turn)
        with _own_code("reading a turn"):
            rollout.classes += self.setup.renderer.classes(completion.ids)
            if len(rollout.classes) != len(rollout.ids):
                raise RuntimeError(f"{len(rollout.classes)} classes for {len(rollout.ids)} tokens")
            message, problem = self.setup.renderer.parse(completion.ids)
        rollout.messages.append(message)
        if completion.finish == "length":  # half a turn is not acted upon: its call may be half a call
            full = len(context) + len(completion.ids) >= self.max_length
            rollout.stop = "context" if full else "length"
            return True
        try:
            with _own_code("acting on a turn"):
                observed, done = await self._observe(message, problem, rollout.tools)
        except PolicyCrashed as crash:
            rollout.messages.append({"role": "user", "content": encodable(str(crash))})
            rollout.stop, self.crash = "crashed", crash
            return True
        rollout.messages += observed
        if done:
            rollout.stop = "env_done" if message.get("tool_calls") else "answer"
        elif turn + 1 == self.setup.env.max_turns:
            rollout.stop = "max_turns"
        elif not self._append_observed(rollout, observed, turn):
            rollout.stop = "context"
        return bool(rollout.stop)

    async def _observe(self, message: Message, problem: str, tools: list[Tool]) -> tuple[list[Message], bool]:
        """The environment's answer, or the error of a call that cannot be made."""
        if problem:
            return [_error(problem)], False
        known = {tool["function"]["name"] for tool in tools}
        calls = message.get("tool_calls") or []
        if any(call["function"]["name"] not in known for call in calls):
            return [_refused(call, known) for call in calls], False
        messages, done = await self.environment.step(message)
        return [_cut(m, self.setup.env.max_observation_chars) for m in messages], done

    def _append_generated(self, rollout: Rollout, completion: Completion, turn: int) -> None:
        size = len(completion.ids)
        rollout.ids += completion.ids
        rollout.generated += [True] * size
        rollout.logprobs += completion.logprobs
        rollout.turns += [turn] * size

    def _append_observed(self, rollout: Rollout, messages: list[Message], turn: int) -> bool:
        """Append what the policy reads next, if it and an answer fit, so that a rollout ends in generated tokens."""
        with _own_code("rendering an observation"):
            ids = self.setup.renderer.observation(messages)
        size = len(ids)
        if len(rollout.prompt_ids) + len(rollout.ids) + size >= self.max_length:
            return False
        rollout.ids += ids
        rollout.generated += [False] * size
        rollout.logprobs += [0.0] * size
        rollout.turns += [turn] * size
        rollout.classes += [int(TokenClass.FORMAT)] * size
        return True


@contextmanager
def _own_code(what: str) -> Iterator[None]:
    """What our own code raises here is its fault, and costs the rollout alone."""
    try:
        yield
    except (EnvironmentBroken, PolicyCrashed):
        raise
    except Exception as error:
        raise RolloutBug(f"{what}: {error!r}") from error


def _error(problem: str, **fields: Any) -> Message:
    return {"role": "tool", **fields, "content": json.dumps({"error": problem}, ensure_ascii=False)}


def _refused(call: dict[str, Any], known: set[str]) -> Message:
    """Nothing of a message with an unknown tool is run: half of it might do what the policy did not mean."""
    name = call["function"]["name"]
    problem = "unknown tool in another call" if name in known else f"unknown tool {name}"
    return _error(problem, tool_call_id=call.get("id", ""))


def _cut(message: Message, limit: int) -> Message:
    content = message.get("content")
    if not isinstance(content, str) or len(content) <= limit:
        return message
    return {**message, "content": content[: max(0, limit - len(CUT))] + CUT}
