"""What an environment must give, checked at each call, so that a fault is named where it is made and never scored.

`trainer.envs.load` wraps every suite in `CheckedSuite`: its environments raise `EnvironmentBroken` with one line that
names the plug-in, the method and what is needed, whatever their code does. Time limits are the episode's.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from trainer import plugins
from trainer.data import Message, Outcome, Task, TaskClass, Tool
from trainer.errors import EnvironmentBroken, EnvironmentBug, EnvironmentLost, PolicyCrashed, ReportedError, UserError
from trainer.protocols import Environment, Suite
from trainer.rollout.rewards import finite

ROLES = ("system", "developer", "user", "assistant", "tool")
SUITE = (("tasks", 1, False), ("make", 0, False), ("answer_literals", 1, False), ("refusal", 0, False))
ENVIRONMENT = (("reset", 1, True), ("step", 1, True), ("outcome", 0, True), ("close", 0, True))


class CheckedEnvironment:
    """An environment whose every fault is an `EnvironmentBroken`; `PolicyCrashed` passes through."""

    def __init__(self, plugin: str, environment: Environment) -> None:
        self.plugin, self._environment = plugin, environment
        for method, arguments, asynchronous in ENVIRONMENT:
            if problem := plugins.wrong_method(environment, method, arguments, asynchronous=asynchronous):
                raise EnvironmentBroken(f"{plugin}: {type(environment).__name__} {problem}")
        if open_ := getattr(environment, "open", None):
            self.open = lambda: self._call("open", open_)

    @property
    def waits_for(self) -> str:
        return str(getattr(self._environment, "waits_for", ""))

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        found = await self._call("reset", self._environment.reset, task)
        messages, tools = self._pair("reset", found, "(messages, tools)")
        self._must("reset", messages_problem(messages, "messages") or tools_problem(tools))
        if not messages:
            raise self._broken("reset", "returned no message, needs at least the one that states the task")
        return [dict(m) for m in messages], [dict(t) for t in tools]

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        found = await self._call("step", self._environment.step, message)
        messages, done = self._pair("step", found, "(messages, done)")
        self._must("step", messages_problem(messages, "messages", answers=True))
        if not _is_bool(done):
            raise self._broken("step", f"returned {_show(done)} as done, needs True or False")
        if not messages and not done:
            raise self._broken("step", "returned no message in an episode that goes on, needs one, or done = True")
        return [dict(m) for m in messages], bool(done)

    async def outcome(self) -> Outcome:
        found = await self._call("outcome", self._environment.outcome)
        if not isinstance(found, Outcome):
            raise self._broken("outcome", f"returned {_show(found)}, needs a trainer.data.Outcome")
        self._must("outcome", outcome_problem(found))
        reward = finite(found.reward, f"{self.plugin}: outcome returned a reward that is none")
        return replace(found, reward=reward, success=None if found.success is None else bool(found.success))

    async def close(self) -> None:
        await self._call("close", self._environment.close)

    async def _call(self, method: str, function: Any, *arguments: Any) -> Any:
        try:
            found = function(*arguments)
            if not inspect.isawaitable(found):
                raise self._broken(method, f"is not asynchronous, needs `async def {method}`")
            return await found
        except (EnvironmentBroken, PolicyCrashed, ReportedError):
            raise
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _being_cancelled():
                raise
            file = plugins.file_of(self._environment)
            what = f"{self.plugin}: {method} raised {plugins.explain(error, file)}"
            raise (EnvironmentBroken if isinstance(error, OSError) else EnvironmentBug)(what) from error

    def _pair(self, method: str, found: Any, needs: str) -> tuple[Any, Any]:
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            size = f" of {len(found)}" if isinstance(found, (tuple, list)) else ""
            what = type(found).__name__ + size if size else _show(found)
            raise self._broken(method, f"returned {what}, needs {needs}")
        return found[0], found[1]

    def _must(self, method: str, problem: str) -> None:
        if problem:
            raise self._broken(method, f"returned {problem}")

    def _broken(self, method: str, what: str) -> EnvironmentBroken:
        return EnvironmentBroken(f"{self.plugin}: {method} {what}")


class CheckedSuite:
    """A suite whose faults are named: at set-up as a `UserError`, in a run as `EnvironmentBroken` or `EnvironmentLost`.

    Attributes beyond the protocol, such as a pool of worlds, are those of the suite.
    """

    def __init__(self, plugin: str, suite: Suite) -> None:
        self.plugin, self._suite = plugin, suite
        plugins.check_methods("env.name", plugin, suite, SUITE)
        try:
            name, splits = getattr(suite, "name", None), getattr(suite, "splits", None)
        except Exception as error:
            why = plugins.explain(error, plugins.file_of(suite))
            raise UserError(f"env.name: {plugin}: name or splits cannot be read ({why})") from error
        if not isinstance(name, str) or not name:
            raise UserError(f"env.name: {plugin} has {_show(name)} as name, needs a word, for metrics and traces")
        sizes = isinstance(splits, Mapping) and all(isinstance(k, str) and _is_int(v) for k, v in splits.items())
        if not sizes or not splits:
            raise UserError(
                f"env.name: {plugin} has {_show(splits)} as splits, needs the number of tasks of each, such as "
                '{"train": 90, "dev": 30}'
            )
        self.name: str = name
        self.splits: Mapping[str, int] = splits

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_suite":
            raise AttributeError(name)
        return getattr(self._suite, name)

    def tasks(self, split: str) -> list[Task]:
        found = self._ask(UserError, "tasks", split)
        if problem := tasks_problem(found, split, self.splits.get(split)):
            raise UserError(f"{self.plugin}: tasks({split!r}) {problem}")
        return list(found)

    def make(self) -> Environment:
        made = self._ask(EnvironmentBroken, "make")
        if inspect.isawaitable(made):
            raise EnvironmentBroken(f"{self.plugin}: make is asynchronous, needs a plain `def make`; wait in `open`")
        return CheckedEnvironment(self.plugin, made)

    def answer_literals(self, task: Task) -> list[str]:
        found = self._ask(EnvironmentLost, "answer_literals", task)
        if not isinstance(found, (list, tuple, set, frozenset)) or not all(isinstance(text, str) for text in found):
            raise EnvironmentLost(f"{self.plugin}: answer_literals returned {_show(found)}, needs a list of strings")
        return list(found)

    def refusal(self) -> Message:
        return self._message("refusal", self._ask(EnvironmentBroken, "refusal"))

    def gold(self, task: Task) -> list[Message]:
        found = self._ask(EnvironmentBroken, "gold", task)
        if not isinstance(found, (list, tuple)) or not found:
            raise EnvironmentBroken(f"{self.plugin}: gold returned {_show(found)}, needs a list of assistant messages")
        return [self._message("gold", message) for message in found]

    @property
    def has_gold(self) -> bool:
        return callable(getattr(self._suite, "gold", None))

    def _message(self, method: str, message: Any) -> Message:
        if problem := messages_problem([message], "a message"):
            raise EnvironmentBroken(f"{self.plugin}: {method} returned {problem}")
        if message["role"] != "assistant":
            raise EnvironmentBroken(f"{self.plugin}: {method} returned a message of {message['role']}, needs assistant")
        return dict(message)

    def _ask(self, fault: type[Exception], method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._suite, method)(*arguments)
        except (EnvironmentBroken, ReportedError):
            raise
        except (Exception, SystemExit) as error:
            why = plugins.explain(error, plugins.file_of(self._suite))
            raise fault(f"{self.plugin}: {method} raised {why}") from error


def messages_problem(messages: Any, what: str, *, answers: bool = False) -> str:
    """What is wrong with messages; "" for nothing. `answers`: they answer the assistant, so none is the assistant's."""
    if not isinstance(messages, (list, tuple)):
        return f"{_show(messages)} as {what}, needs a list of dicts such as " + '{"role": "user", "content": "..."}'
    for message in messages:
        if not isinstance(message, Mapping):
            return f"a message that is {_show(message)}, needs a dict such as " + '{"role": "user", "content": "..."}'
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if role not in ROLES:
            return f"a message with role {_show(role)}, needs one of {', '.join(ROLES)}"
        if answers and role == "assistant":
            return "a message of the assistant, needs those that answer it: role tool or user"
        if not isinstance(content, str) and not (content is None and calls):
            return f"a message with {_show(content)} as content, needs a string"
        if calls and (problem := _calls_problem(calls)):
            return problem
    return _json_problem(messages, what)


def _calls_problem(calls: Any) -> str:
    if not isinstance(calls, (list, tuple)):
        return f"{_show(calls)} as tool_calls, needs a list"
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return f"a tool call {_show(call)}, needs id, type and function with its name and arguments"
        if not isinstance(function.get("arguments"), str):
            return f"a call of {function['name']} with {_show(function.get('arguments'))} as arguments, needs JSON text"
    return ""


def tools_problem(tools: Any) -> str:
    """What is wrong with the tools of an episode; "" for nothing."""
    needs = 'needs {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
    if not isinstance(tools, (list, tuple)):
        return f"{_show(tools)} as tools, needs a list of dicts"
    names = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            return f"a tool that is {_show(tool)}, {needs}"
        if not isinstance(function.get("name"), str) or not function["name"]:
            return f"a tool without a name: {_show(tool)}, {needs}"
        if not isinstance(function.get("parameters", {}), Mapping):
            return f"{_show(function['parameters'])} as parameters of {function['name']}, needs a JSON schema"
        names.append(function["name"])
    if twice := sorted({name for name in names if names.count(name) > 1}):
        return f"two tools called {', '.join(twice)}, needs a name for each"
    return _json_problem(tools, "tools")


def outcome_problem(outcome: Any) -> str:
    """What is wrong with an outcome but for the reward, which `trainer.rollout.rewards` looks at; "" for nothing."""
    if outcome.success is not None and not _is_bool(outcome.success):
        return f"{_show(outcome.success)} as success, needs True, False, or None to have it judged from the reward"
    if not isinstance(outcome.reason, str):
        return f"{_show(outcome.reason)} as reason, needs a string"
    if not isinstance(outcome.details, Mapping):
        return f"{_show(outcome.details)} as details, needs a dict"
    return ""


def tasks_problem(tasks: Any, split: str, size: int | None) -> str:
    """What is wrong with the tasks of a split of `size` tasks; "" for nothing."""
    if not isinstance(tasks, (list, tuple)):
        return f"returned {_show(tasks)}, needs a list of trainer.data.Task"
    seen: set[str] = set()
    for task in tasks:
        if not isinstance(task, Task):
            return f"holds {_show(task)}, needs trainer.data.Task"
        if task.task_class not in get_args(TaskClass):
            return f"holds {task.id} of task_class {task.task_class!r}, needs one of {', '.join(get_args(TaskClass))}"
        if task.id in seen:
            return f"holds two tasks with id {task.id!r}, needs an id for each"
        seen.add(task.id)
        if task.split != split:
            return f"holds {task.id} of split {task.split!r}, needs {split!r}"
    if size is not None and len(tasks) != size:
        return f"holds {len(tasks)} tasks, needs {size}, as splits says"
    return ""


def _json_problem(value: Any, what: str) -> str:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return f"{what} that are no JSON ({error}), needs strings, numbers, lists and dicts"
    return ""


def _being_cancelled() -> bool:
    """Whether somebody cancels this call; else a cancellation is the environment's own affair that got loose."""
    task = asyncio.current_task()
    cancelling = getattr(task, "cancelling", None)  # from Python 3.11 on
    return cancelling is None or cancelling() > 0


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _show(value: Any) -> str:
    """A value for a message, cut short."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return f"{value!r:.60}"
    try:
        text = repr(value)
    except Exception:
        text = "..."
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
