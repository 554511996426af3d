"""The user simulator: a language model behind an OpenAI-compatible endpoint, or a script for tests.

The prompt of the first, its bookkeeping and the marks that end a conversation are the benchmark's own
(`UserSimulator`); only the call goes through the official OpenAI client instead of litellm.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from openai import AsyncOpenAI, OpenAIError
from tau2.data_model.message import UserMessage
from tau2.data_model.tasks import Task
from tau2.user.base import STOP, TRANSFER
from tau2.user.user_simulator import UserSimulator

from trainer.errors import EnvironmentBroken
from trainer.references.endpoint import transport
from trainer.references.openai_writer import reason_of, text_of
from trainer.references.writer_prompt import Refused

MakeUserSimulator = Callable[[Task], UserSimulator]  # a fresh one for each conversation


ONE_AT_A_TIME = threading.Lock()


def _calls() -> asyncio.AbstractEventLoop:
    """The event loop of all calls, in a thread that keeps no process from ending."""
    with ONE_AT_A_TIME:  # conversations ask from threads of their own
        return _made_once()


@cache
def _made_once() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="user-simulators", daemon=True).start()
    return loop


@dataclass(frozen=True)
class Endpoint:
    """The endpoint of the simulator. Calls run in a loop of their own, so that one can be cancelled at any time."""

    base_url: str
    model: str
    temperature: float
    api_key_env: str
    timeout: float  # seconds per try
    max_retries: int  # of 408, 409, 429, 5xx, lost connections and time-outs; the client waits longer each time

    @cached_property
    def client(self) -> AsyncOpenAI:
        key = os.environ.get(self.api_key_env, "").strip() or "none"
        return AsyncOpenAI(
            api_key=key,
            base_url=self.base_url,
            timeout=self.timeout,
            max_retries=self.max_retries,
            http_client=transport(self.base_url, key),
        )

    def call(self, messages: list[dict[str, Any]]) -> Future[str]:
        """Ask for the model's next message; from any thread.

        Raises:
            EnvironmentBroken: from the future's `result`: there is none after the retries; one word says why, since
                the error's own text may quote the key.
        """
        return asyncio.run_coroutine_threadsafe(self._ask(messages), _calls())

    async def _ask(self, messages: list[dict[str, Any]]) -> str:
        create: Any = self.client.chat.completions.create
        answer = create(model=self.model, messages=messages, temperature=self.temperature)
        try:
            # The client's time-out is between bytes; this one is for the whole call, so that no trickle holds a thread.
            return text_of(await asyncio.wait_for(answer, self.deadline))
        except Refused as refusal:
            reason = refusal.reason
        except (OpenAIError, ValueError, asyncio.TimeoutError) as error:
            reason = reason_of(error)
        raise EnvironmentBroken(f"the user simulator ({self.model} at {self.base_url}) gave no answer: {reason}")

    @property
    def deadline(self) -> float:
        """Seconds of one answer: every try, and the longest pause that the client makes of its own between two."""
        return self.timeout * (self.max_retries + 1) + 8.0 * self.max_retries


class EndpointUserSimulator(UserSimulator):  # type: ignore[misc]
    """The benchmark's user simulator, through `endpoint`."""

    def __init__(self, endpoint: Endpoint, task: Task):
        super().__init__(instructions=str(task.user_scenario), llm=endpoint.model)
        self._endpoint = endpoint
        self._call: Future[str] | None = None
        self._closed = False

    def generate_next_message(self, message: Any, state: Any) -> tuple[Any, Any]:
        state.messages.append(message)
        history = [{"role": m.role, "content": m.content} for m in (*state.system_messages, *state.flip_roles())]
        self._call = self._endpoint.call(history)
        if self._closed:
            self._call.cancel()
        try:
            answer = UserMessage(role="user", content=self._call.result())
        except CancelledError:
            raise EnvironmentBroken("the conversation was closed while the user simulator was speaking") from None
        state.messages.append(answer)
        return answer, state

    def hang_up(self) -> None:
        """Cancel the call under way, and any later one: its answer is not needed, but its thread is."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()


class ScriptedUserSimulator(UserSimulator):  # type: ignore[misc]
    """Tells the whole scenario at once, says yes once, and hangs up. Needs no endpoint, and is not the benchmark."""

    YES = "Yes, please go ahead."

    def __init__(self, task: Task):
        super().__init__(instructions=str(task.user_scenario))
        wishes = task.user_scenario.instructions
        parts = [wishes.reason_for_call, wishes.known_info, wishes.unknown_info, wishes.task_instructions]
        self._lines = iter(["\n".join(part for part in parts if part), self.YES])

    def generate_next_message(self, message: Any, state: Any) -> tuple[Any, Any]:
        transferred = "TRANSFERRED TO A HUMAN" in (message.content or "").upper()  # the policy's words for it
        return UserMessage(role="user", content=TRANSFER if transferred else next(self._lines, STOP)), state

    def hang_up(self) -> None: ...
