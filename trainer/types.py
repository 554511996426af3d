"""The data that flows through one training step.

Messages and tools are plain dicts in the OpenAI chat format. Tokens are what the engine sampled: text is never
tokenised again, so `Rollout.ids` is exactly what is trained on.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Message = dict[str, Any]  # OpenAI chat message: role, content, tool_calls, tool_call_id
Tool = dict[str, Any]  # OpenAI tool: {"type": "function", "function": {"name", "description", "parameters"}}
TaskClass = Literal["state_changing", "information", "transfer", "no_action"]


class UserError(Exception):
    """A mistake of the person at the keyboard: shown as one line that names the thing and the remedy; exit code 2."""

    @property
    def lines(self) -> list[str]:
        """What is shown: one line."""
        return [" ".join(str(self).split())]


class UserErrors(UserError):
    """Several mistakes, each a line of its own: who mends one should not have to start again to hear of the next."""

    def __init__(self, errors: Sequence[UserError | str]) -> None:
        each = [line for error in errors for line in (UserError(error) if isinstance(error, str) else error).lines]
        super().__init__(each[0] + (f" (and {len(each) - 1} more)" if len(each) > 1 else ""))
        self._each = each

    @property
    def lines(self) -> list[str]:
        return list(self._each)


def all_of(*checks: Callable[[], object]) -> None:
    """Make every check, and raise what all of them had to say as one error."""
    errors: list[UserError] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)


class EnvironmentBroken(Exception):
    """The environment failed, not the policy: the rollout is dropped and counted, never scored."""


class PolicyCrashed(Exception):
    """The policy's own code ended its world: the episode ends there and fails. Raised by `step` alone."""


class Lost(UserError):
    """What a run needs is gone, after every retry: the step is not taken, and the run stops with a checkpoint."""


class EngineLost(Lost):
    """No engine answers."""


class EnvironmentLost(Lost):
    """No rollout comes through, whatever the task: what breaks is not an episode but what all of them need."""


class TokenClass(enum.IntEnum):
    """What a generated token is for; a slice for metrics and the viewer, never a rule of the credit."""

    FORMAT = 0  # turn and call markers, JSON punctuation
    REASONING = 1
    CALL_NAME = 2
    ARGUMENT = 3
    ANSWER = 4


@dataclass(frozen=True)
class Task:
    """One task of one environment. `data` belongs to the environment and is never shown to policy or writer."""

    id: str
    env: str
    split: str
    scenario: str  # tasks of one scenario count together in SGC
    task_class: TaskClass
    instruction: str
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Outcome:
    """The verifier's word on a finished episode."""

    reward: float  # 0.0 or 1.0
    details: Mapping[str, Any] = field(default_factory=dict)  # machine labels; kept from policy and writer


@dataclass(frozen=True)
class Sampling:
    """How the engine samples. Training wants temperature = 1 and top_p = 1, or the ratios are biased."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    max_tokens: int = 256


@dataclass(frozen=True)
class Completion:
    """One assistant turn as sampled."""

    ids: list[int]  # includes the stop token when finish == "stop"
    logprobs: list[float]  # log-probs of the *processed* distribution (after temperature), one per id
    finish: Literal["stop", "length"]


@dataclass
class Rollout:
    """One episode: a prompt, then generated and observed tokens in turn. The five lists run in parallel."""

    task: Task
    prompt_messages: list[Message]
    tools: list[Tool]
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)  # everything after the prompt
    generated: list[bool] = field(default_factory=list)  # True: sampled by the policy, and so a loss token
    logprobs: list[float] = field(default_factory=list)  # the engine's; 0.0 at observed tokens
    turns: list[int] = field(default_factory=list)  # assistant turn of each token
    classes: list[int] = field(default_factory=list)  # TokenClass of each token; FORMAT at observed tokens
    messages: list[Message] = field(default_factory=list)  # the transcript after the prompt
    reward: float = 0.0
    stop: str = ""  # "answer" | "max_turns" | "length" | "context" | "env_done" | "crashed"
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Group:
    """The siblings of one task, and the reference that was written from them."""

    task: Task
    rollouts: list[Rollout]
    reference: str = ""  # "" means none: the group trains with W = 1
    reference_info: dict[str, Any] = field(
        default_factory=dict
    )  # writer, cached, tokens, seconds, error, sanitiser hits
    problem: str = ""  # why the last of its rollouts that broke did

    @property
    def mixed(self) -> bool:
        """Some sibling succeeded and some failed."""
        return 0 < sum(r.reward for r in self.rollouts) < len(self.rollouts)


class Environment(Protocol):
    """One live episode. An environment that breaks raises `EnvironmentBroken`; it never scores 0 for it.

    `env.timeout` ends a call only where it awaits: one that blocks holds every other episode too, and nothing can stop
    it. What may block (a subprocess, a socket, a long computation) belongs in a thread (`asyncio.to_thread`) or a
    process that the environment awaits. What it waits for may be said in an attribute `waits_for`, which a time-out
    then names.

    One that must wait for a place (in a pool of processes, say) may offer `async def open(self) -> None`: it is awaited
    before `reset`, and untimed, because a queue is no fault of the environment.
    """

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]: ...
    async def step(self, message: Message) -> tuple[list[Message], bool]:
        """Take the assistant's message; give the messages it leads to and whether the episode is over."""
        ...

    async def outcome(self) -> Outcome: ...
    async def close(self) -> None: ...


class Suite(Protocol):
    """A family of tasks: `trainer.envs.load(name)` gives one."""

    name: str
    splits: Mapping[str, int]  # split -> number of tasks

    def tasks(self, split: str) -> list[Task]: ...
    def make(self) -> Environment: ...
    def answer_literals(self, task: Task) -> list[str]:
        """Strings that give the answer away; tokens that spell one keep W = 1 and the writer never sees them."""
        ...

    def refusal(self) -> Message:
        """All that the polite refuser says, until the episode ends: the do-nothing baseline of every evaluation."""
        ...


class Engine(Protocol):
    """Tokens in, tokens out. An engine that fails raises `EngineLost`; what it did not sample is never scored."""

    generator: Any  # torch.Generator: all the randomness it has, kept by checkpoints

    async def generate(self, prompt_ids: Sequence[int], n: int, sampling: Sampling) -> list[Completion]: ...
    def load_weights(self, model: Any) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


class Renderer(Protocol):
    """Messages to tokens and back, for one family of models. Later turns are appended, never re-rendered."""

    stop_ids: frozenset[int]
    pad_id: int

    def prompt(self, messages: list[Message], tools: list[Tool], reference: str = "") -> list[int]:
        """The first prompt, ending where the assistant speaks. `reference` goes into the system or first user block;
        with reference == "" the result is identical to the student's prompt."""
        ...

    def observation(self, messages: list[Message]) -> list[int]:
        """What follows an assistant turn that ended in its stop token: the new messages, the assistant's opening."""
        ...

    def parse(self, ids: Sequence[int]) -> tuple[Message, str]:
        """The assistant message that `ids` spell, and "" or what is wrong with its tool call. Never raises."""
        ...

    def classes(self, ids: Sequence[int]) -> list[int]:
        """The TokenClass of each token of one assistant turn."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...
    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, for the viewer and for finding literals; concatenated they are the text."""
        ...
