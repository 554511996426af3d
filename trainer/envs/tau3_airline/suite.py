"""The suite: tasks, splits and classes from the benchmark's files, and the user simulator."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trainer.data import Message, Task, TaskClass
from trainer.envs.tau3_airline import installation
from trainer.errors import UserError, all_of
from trainer.protocols import Environment
from trainer.references.endpoint import is_loopback, refuse_cleartext
from trainer.references.literals import spans

if TYPE_CHECKING:
    from trainer.envs.tau3_airline.user_simulators import MakeUserSimulator

WRITES = {  # of the airline's tools; a slow test holds this against the tools' own marks
    "book_reservation",
    "cancel_reservation",
    "send_certificate",
    "update_reservation_baggages",
    "update_reservation_flights",
    "update_reservation_passengers",
}
TRANSFER = "transfer_to_human_agents"
MIN_LITERAL = 3  # characters; a shorter one would mask every other number


class Tau3AirlineSuite:
    """The airline's tasks, split as the benchmark splits them: train 30, test 20, base all 50.

    Args:
        user: "llm", the benchmark's user simulator through an endpoint, or "scripted", which needs no endpoint and
            is for tests: its scores are not the benchmark's.
        user_base_url, user_model, user_temperature: of the "llm" simulator. They decide how hard the task is and have
            no defaults, so that they stand in every config and in every run's record.
        user_api_key_env: the environment variable that holds the endpoint's key; a server on this machine needs none.
        user_timeout: seconds per try.
        user_max_retries: tries after the first.
        concurrency: conversations that may be in a world, a user simulator or the evaluator at once, one thread each.

    Raises:
        UserError: an option has a value that does not fit, a package is missing, or `tau2` is another project's.
    """

    name = "tau3_airline"

    def __init__(
        self,
        user: str = "llm",
        user_base_url: str | None = None,
        user_model: str | None = None,
        user_temperature: float | None = None,
        user_api_key_env: str = "OPENAI_API_KEY",
        user_timeout: float = 30.0,
        user_max_retries: int = 3,
        concurrency: int = 32,
    ):
        _check("user", user, user in ("llm", "scripted"), "llm or scripted")
        whole = type(concurrency) is int and concurrency > 0
        _check("concurrency", concurrency, whole, "a whole number of at least 1")
        endpoint = (user_base_url, user_model, user_temperature, user_api_key_env, user_timeout, user_max_retries)
        all_of(lambda: _check_endpoint(*endpoint) if user == "llm" else None, installation.check)
        folder = installation.data_folder()
        self._episode = installation.load()
        self._airline = self._episode.airline(folder)
        self.api_key_env = user_api_key_env  # what it holds never goes to another endpoint
        self._make_user = self._make_simulator(user, *endpoint)
        self._waits_for = f"the user simulator ({user_model} at {user_base_url})" if user == "llm" else ""
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix=self.name)
        self._rows: list[dict[str, Any]] = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
        self._splits: dict[str, list[str]] = json.loads((folder / "split_tasks.json").read_text(encoding="utf-8"))
        self.splits: Mapping[str, int] = {split: len(ids) for split, ids in self._splits.items()}
        self._tasks = functools.cache(self._make_tasks)
        self._public = f"{self._airline.policy}\n{json.dumps(self._airline.tools)}"

    @staticmethod
    def _make_simulator(user: str, *endpoint: Any) -> MakeUserSimulator:
        from trainer.envs.tau3_airline import user_simulators

        if user == "scripted":
            return user_simulators.ScriptedUserSimulator
        return functools.partial(user_simulators.EndpointUserSimulator, user_simulators.Endpoint(*endpoint))

    def tasks(self, split: str) -> list[Task]:
        if split not in self._splits:
            raise UserError(f"env: tau3_airline has no split {split!r}; there are {', '.join(self._splits)}")
        return list(self._tasks(split))

    def _make_tasks(self, split: str) -> tuple[Task, ...]:
        wanted = set(self._splits[split])
        return tuple(self._task(row, split) for row in self._rows if row["id"] in wanted)

    def _task(self, row: dict[str, Any], split: str) -> Task:
        """`instruction` is why the user calls: what the writer may know. The scenario's conditions stay hidden."""
        return Task(
            id=f"airline_{row['id']}",
            env=self.name,
            split=split,
            scenario=f"airline_{row['id']}",
            task_class=gold_class([action["name"] for action in _criteria(row, "actions")]),
            instruction=row["user_scenario"]["instructions"]["reason_for_call"],
            data={"row": row, "task": self._episode.read_task(row)},
        )

    def make(self) -> Environment:
        environment: Environment = self._episode.Tau3AirlineEnvironment(
            self._airline, self._make_user, self._pool, self._waits_for
        )
        return environment

    def answer_literals(self, task: Task) -> list[str]:
        """What must be found out or worked out: values of gold arguments, and what must be told to the user.

        Left out are values that the user, the policy or the tools' documentation say, and those of fewer than
        three characters.
        """
        row = task.data["row"]
        known = f"{json.dumps(row['user_scenario'], ensure_ascii=False)}\n{self._public}"
        values = [leaf for action in _criteria(row, "actions") for leaf in _leaves(action["arguments"])]
        texts = {str(value) for value in (*values, *_criteria(row, "communicate_info")) if not isinstance(value, bool)}
        return sorted(text for text in texts if len(text) >= MIN_LITERAL and not _occurs(text, known))

    def refusal(self) -> Message:
        return {"role": "assistant", "content": "I am sorry, I cannot help with that."}


def gold_class(calls: Sequence[str]) -> TaskClass:
    """What gold amounts to. A transfer is no write, and nothing verifies it, but it is not doing nothing either."""
    if WRITES.intersection(calls):
        return "state_changing"
    return "transfer" if TRANSFER in calls else "information" if calls else "no_action"


def _criteria(row: Mapping[str, Any], name: str) -> list[Any]:
    return row["evaluation_criteria"].get(name) or []


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for child in value.values() for leaf in _leaves(child)]
    if isinstance(value, list):
        return [leaf for child in value for leaf in _leaves(child)]
    return [] if value is None else [value]


def _occurs(text: str, where: str) -> bool:
    return bool(spans(where, [text]))


def _check(name: str, value: Any, fits: bool, need: str) -> None:
    if not fits:
        raise UserError(f"env.options.{name}: got {value!r}, needs {need}")


def _check_endpoint(base_url: Any, model: Any, temperature: Any, key_env: Any, timeout: Any, retries: Any) -> None:
    """Refuse what does not fit or is missing, all of it at once; a key of the environment that is not set, too."""
    whole = type(retries) is int and retries >= 0
    cool = _number(temperature) and temperature >= 0
    named = isinstance(model, str) and bool(model)
    all_of(
        lambda: _check_url(base_url),
        lambda: _check("user_model", model, named, "the name of the model of the user simulator"),
        lambda: _check("user_temperature", temperature, cool, "a number; the benchmark uses 0.0"),
        lambda: _check_key(base_url, key_env),
        lambda: _check("user_timeout", timeout, _number(timeout) and timeout > 0, "seconds, more than 0"),
        lambda: _check("user_max_retries", retries, whole, "a whole number of at least 0"),
    )


def _check_url(base_url: Any) -> None:
    url = urlsplit(base_url) if isinstance(base_url, str) else None
    web = url is not None and url.scheme in ("http", "https") and bool(url.hostname)
    script = "env.options.user scripted needs none, but is for tests"
    _check("user_base_url", base_url, web, f"the user simulator's endpoint, such as http://localhost:8000/v1; {script}")
    if url is not None and (url.username or url.password or url.query):
        raise UserError("env.options.user_base_url: needs a URL without credentials; keys come from user_api_key_env")


def _check_key(base_url: Any, key_env: Any) -> None:
    named = isinstance(key_env, str) and key_env.isidentifier() and not key_env.startswith(("sk_", "hf_"))
    if not named:  # it may be a key that was put here by mistake
        raise UserError("env.options.user_api_key_env: needs the name of an environment variable, not the key itself")
    if isinstance(base_url, str) and not is_loopback(base_url) and not os.environ.get(key_env, "").strip():
        raise UserError(f"env.options.user_api_key_env: ${key_env} is not set; run: export {key_env}=...")
    if isinstance(base_url, str):
        refuse_cleartext("env.options.user_base_url", base_url, key_env)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
