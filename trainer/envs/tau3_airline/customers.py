"""Who plays the customer: a language model behind an OpenAI-compatible endpoint, or a script for tests.

The prompt of the first, its bookkeeping and the marks that end a conversation are the benchmark's own
(`UserSimulator`); only the call goes through the official OpenAI client instead of litellm.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from openai import DefaultHttpxClient, OpenAI, OpenAIError
from tau2.data_model.message import UserMessage
from tau2.data_model.tasks import Task
from tau2.user.base import STOP, TRANSFER
from tau2.user.user_simulator import UserSimulator

from trainer.credit.endpoint import is_loopback, only_ours
from trainer.credit.openai_writer import reason_of, text_of
from trainer.credit.prompt import Refused
from trainer.types import EnvironmentBroken

Customer = Callable[[Task], UserSimulator]  # a fresh one for each conversation


@dataclass(frozen=True)
class Endpoint:
    """Where the customer's words come from. `ask` blocks, and may be called from many threads."""

    base_url: str
    model: str
    temperature: float
    api_key_env: str
    timeout: float  # seconds a try
    max_retries: int  # of 408, 409, 429, 5xx, lost connections and time-outs; the client waits longer each time

    @cached_property
    def client(self) -> OpenAI:
        # A proxy of the environment must not see what is meant for this machine. No redirects: what the customer knows,
        # and the key, go where the config says.
        key = os.environ.get(self.api_key_env, "").strip() or "none"
        transport = DefaultHttpxClient(
            trust_env=not is_loopback(self.base_url),
            follow_redirects=False,
            event_hooks={"request": [lambda request: only_ours(request, key)]},
        )
        return OpenAI(
            api_key=key,
            base_url=self.base_url,
            timeout=self.timeout,
            max_retries=self.max_retries,
            http_client=transport,
        )

    def ask(self, messages: list[dict[str, Any]]) -> str:
        """The model's next words.

        Raises:
            EnvironmentBroken: there are none after the retries; one word says why, for the error's own text may quote
                the key.
        """
        create: Any = self.client.chat.completions.create
        try:
            return text_of(create(model=self.model, messages=messages, temperature=self.temperature))
        except Refused as refusal:
            reason = refusal.reason
        except (OpenAIError, ValueError) as error:
            reason = reason_of(error)
        raise EnvironmentBroken(f"the customer ({self.model} at {self.base_url}) gave no answer: {reason}")


class EndpointCustomer(UserSimulator):  # type: ignore[misc]
    """The benchmark's user simulator, through `endpoint`."""

    def __init__(self, endpoint: Endpoint, task: Task):
        super().__init__(instructions=str(task.user_scenario), llm=endpoint.model)
        self._endpoint = endpoint

    def generate_next_message(self, message: Any, state: Any) -> tuple[Any, Any]:
        state.messages.append(message)
        history = [{"role": m.role, "content": m.content} for m in (*state.system_messages, *state.flip_roles())]
        said = UserMessage(role="user", content=self._endpoint.ask(history))
        state.messages.append(said)
        return said, state


class ScriptedCustomer(UserSimulator):  # type: ignore[misc]
    """Tells the whole scenario at once, says yes once, and hangs up. Needs no endpoint, and is not the benchmark."""

    YES = "Yes, please go ahead."

    def __init__(self, task: Task):
        super().__init__(instructions=str(task.user_scenario))
        wishes = task.user_scenario.instructions
        told = [wishes.reason_for_call, wishes.known_info, wishes.unknown_info, wishes.task_instructions]
        self._lines = iter(["\n".join(part for part in told if part), self.YES])

    def generate_next_message(self, message: Any, state: Any) -> tuple[Any, Any]:
        transferred = "TRANSFERRED TO A HUMAN" in (message.content or "").upper()  # the policy's words for it
        return UserMessage(role="user", content=TRANSFER if transferred else next(self._lines, STOP)), state
