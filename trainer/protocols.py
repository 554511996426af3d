"""The protocols of a step's parts: the engine that samples, the environment, the suite of tasks, the renderer.

A new environment, engine or family of models implements one of these protocols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from trainer.data import Completion, Message, Outcome, Sampling, Task, Tool


class Environment(Protocol):
    """One live episode. An environment that breaks raises `EnvironmentBroken`; it never scores 0 for it.

    `env.timeout` can end a call only at an `await`: a blocking call stops every other episode, and cannot be cancelled.
    Blocking work (a subprocess, a socket, a long computation) belongs in a thread (`asyncio.to_thread`) or a process
    that the environment awaits. An attribute `waits_for` may name what it waits for, for the message of a time-out.

    An environment that must wait for a place (in a pool of processes, say) may have `async def open(self) -> None`: it
    is awaited before `reset`, without a time limit, because a queue is not a fault of the environment.
    """

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]: ...
    async def step(self, message: Message) -> tuple[list[Message], bool]:
        """Take the assistant's message; return the messages that answer it, and whether the episode is over."""
        ...

    async def outcome(self) -> Outcome: ...
    async def close(self) -> None: ...


class Suite(Protocol):
    """A family of tasks: `trainer.envs.load(name)` gives one, and `env.name: my_module:Suite` names one of yours.

    `trainer.envs.contract` checks at each call what suite and environment give; docs/environments.md says how to write
    one, and `python -m trainer.run check-env my_module:Suite` plays it.
    """

    name: str
    splits: Mapping[str, int]  # split -> number of tasks

    def tasks(self, split: str) -> list[Task]: ...
    def make(self) -> Environment: ...
    def answer_literals(self, task: Task) -> list[str]:
        """Strings that give the answer away; tokens that spell one keep W = 1 and the writer never sees them."""
        ...

    def refusal(self) -> Message:
        """The message that the polite refuser, the do-nothing baseline of every evaluation, repeats to the end."""
        ...


class SolvedSuite(Suite, Protocol):
    """A suite that knows how its tasks are solved: `check-env` replays that, and every task must count as a success."""

    def gold(self, task: Task) -> list[Message]:
        """The assistant's messages that solve the task, in order, with words at the end if it needs an answer."""
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

    stop_ids: frozenset[int]  # tokens that end a turn: the renderer's own, and the model folder's
    pad_id: int

    def prompt(self, messages: list[Message], tools: list[Tool], reference: str = "") -> list[int]:
        """The first prompt, ending where the assistant speaks. `reference` goes into the system or first user block;
        with reference == "" the result is identical to the student's prompt."""
        ...

    def observation(self, messages: list[Message]) -> list[int]:
        """What follows an assistant turn that ended in any stop token: the new messages, the assistant's opening."""
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
