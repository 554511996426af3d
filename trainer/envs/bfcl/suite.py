"""The suite and its episodes. The user's turns come one after another: an answer without a call ends the turn."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.chat.signatures import signature
from trainer.data import Message, Outcome, Task, Tool
from trainer.envs.bfcl import data
from trainer.envs.bfcl.calls import Call
from trainer.envs.bfcl.data import CATEGORIES, Entry
from trainer.envs.bfcl.verifier import Checker, gold_class
from trainer.envs.bfcl.world import World
from trainer.errors import EnvironmentBroken, UserError

SYSTEM = (
    "Do what the user asks by calling tools. Call until the request is done, then answer in one short sentence. "
    "If a tool or a value that you need is missing, say so and call nothing."
)
HANDOVER = "These functions are available now. What about it?"  # the user's turn that gives held-back functions


class BfclSuite:
    """BFCL multi-turn as tasks.

    Args:
        categories: some of base, miss_func, miss_param, long_context; all four when left out.
        max_user_turns: play and verify only the first so many user turns of each conversation (an easier task than the
            benchmark's: say so wherever such a score is reported). None is the whole conversation.
        max_gold_calls: leave out tasks whose gold needs more calls than this.

    Raises:
        UserError: an option has a value that does not fit or that leaves a split empty, or the package is missing.

    The split is by entry number, which the four categories share: variants of one conversation never straddle splits.
    """

    name = "bfcl"

    def __init__(
        self,
        categories: Sequence[str] = CATEGORIES,
        max_user_turns: int | None = None,
        max_gold_calls: int | None = None,
    ):
        if not isinstance(categories, (list, tuple)) or not categories:
            raise UserError(f"env.options.categories: got {categories!r}, needs a list of {', '.join(CATEGORIES)}")
        for category in categories:
            if category not in CATEGORIES:
                raise UserError(f"env.options.categories: {category!r} is not one of {', '.join(CATEGORIES)}")
        for name, value in (("max_user_turns", max_user_turns), ("max_gold_calls", max_gold_calls)):
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"env.options.{name}: got {value!r}, needs a whole number of at least 1")
        self.categories = tuple(dict.fromkeys(categories))
        self.max_user_turns = max_user_turns
        self.max_gold_calls = max_gold_calls
        data.folder()  # reports a missing package here
        self.splits: Mapping[str, int] = {split: len(self.entries(split)) for split in data.SPLITS}
        for split, size in self.splits.items():
            if not size:
                raise UserError(f"env.options: no task is left in bfcl's {split}; raise max_gold_calls")
        self._tasks = functools.cache(self._make_tasks)

    def entries(self, split: str) -> list[Entry]:
        """The entries behind `tasks(split)`, in the same order."""
        if split not in data.SPLITS:
            raise UserError(f"env: bfcl has no split {split!r}; there are {', '.join(data.SPLITS)}")
        part = data.split_of()
        found = [e for c in self.categories for e in data.entries(c) if part[e.number] == split]
        limit = self.max_gold_calls
        return [e for e in found if limit is None or sum(map(len, e.gold[: self.turns(e)])) <= limit]

    def turns(self, entry: Entry) -> int:
        """How many user turns of `entry` are played."""
        return min(len(entry.turns), self.max_user_turns or len(entry.turns))

    def tasks(self, split: str) -> list[Task]:
        return list(self._tasks(split))

    def _make_tasks(self, split: str) -> tuple[Task, ...]:
        return tuple(self.task(entry, split) for entry in self.entries(split))

    def task(self, entry: Entry, split: str) -> Task:
        """The task of one entry."""
        turns = self.turns(entry)
        return Task(
            id=entry.id,
            env=self.name,
            split=split,
            scenario=f"bfcl_{entry.number}",
            task_class=gold_class(entry, turns),
            instruction="\n".join(text or HANDOVER for text in entry.turns[:turns]),
            data={"entry": entry, "turns": turns},
        )

    def make(self) -> BfclEnvironment:
        return BfclEnvironment()

    def answer_literals(self, task: Task) -> list[str]:
        """Values of gold arguments that neither the user nor the tools' documentation ever says: what must be found."""
        entry, turns = task.data["entry"], task.data["turns"]
        known = f"{task.instruction}\n{json.dumps([data.documentation(api) for api in entry.classes])}".lower()
        values = [v for turn in entry.gold[:turns] for call in turn for v in (*call.named.values(), *call.positional)]
        texts = {_text(leaf) for value in values for leaf in _leaves(value) if not isinstance(leaf, bool)}
        return sorted(text for text in texts if len(text) >= 3 and text.lower() not in known)

    def refusal(self) -> Message:
        return {"role": "assistant", "content": "I am sorry, I cannot help with that."}


class BfclEnvironment:
    """One conversation."""

    def __init__(self) -> None:
        self._entry: Entry | None = None

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        entry: Entry = task.data["entry"]
        self._entry, self._turns = entry, int(task.data["turns"])
        self._world, self._checker = World(entry), Checker(entry)
        self._turn, self._results = 0, list[str]()
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": entry.turns[0]}]
        return messages, data.tools(entry)

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        entry = self._live()
        if self._turn >= self._turns:
            raise EnvironmentBroken(f"bfcl {entry.id}: a step after the end")
        if calls := message.get("tool_calls"):
            return [self._carry_out(call) for call in calls], False
        self._checker.end_turn(self._turn, self._world, self._results)
        self._turn, self._results = self._turn + 1, []
        if self._turn >= self._turns:
            return [], True
        return [{"role": "user", "content": self._user_says(entry)}], False

    def _live(self) -> Entry:
        if self._entry is None:
            raise EnvironmentBroken("bfcl: step or outcome before reset")
        return self._entry

    def _user_says(self, entry: Entry) -> str:
        """The next request; held-back functions come first, one line each."""
        lines = [signature(tool, described=True) for tool in data.new_tools(entry, self._turn)]
        return "\n".join([*lines, entry.turns[self._turn] or HANDOVER])

    def _carry_out(self, call: Mapping[str, Any]) -> Message:
        """One tool call of the policy as a tool message; its mistakes come back as what the tool says."""
        reply = {"role": "tool", "tool_call_id": call.get("id", ""), "name": call["function"]["name"]}
        arguments = call["function"].get("arguments") or {}
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError as error:
            return {**reply, "content": json.dumps({"error": f"the arguments are not JSON: {error}"})}
        if not isinstance(arguments, dict):
            return {**reply, "content": json.dumps({"error": "the arguments must be an object"})}
        result = self._world.call(Call(call["function"]["name"], arguments))
        self._results.append(result)
        return {**reply, "content": result}

    async def outcome(self) -> Outcome:
        """1 when every user turn ended and passed both checks."""
        entry = self._live()
        details: dict[str, Any] = {"category": entry.category, "turns": self._turn}
        failure = self._checker.failure
        if failure is None and self._turn < self._turns:
            failure = {"failed_turn": self._turn, "reason": "unfinished"}
        why = f"turn {failure['failed_turn']}: {failure['reason']}" if failure else ""
        return Outcome(0.0 if failure else 1.0, {**details, **(failure or {})}, success=not failure, reason=why)

    async def close(self) -> None:
        self._entry = None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for child in value.values() for leaf in _leaves(child)]
    if isinstance(value, (list, tuple)):
        return [leaf for child in value for leaf in _leaves(child)]
    return [value]


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
