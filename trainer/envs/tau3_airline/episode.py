"""One conversation, run by the benchmark's own orchestrator and scored by its own evaluator.

The orchestrator asks an agent for its next message; `Relay` gives it the policy's, one step at a time. What is here
besides is translation between OpenAI messages and the benchmark's, and what may not reach it.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

from tau2.agent.base import BaseAgent
from tau2.agent.llm_agent import AGENT_INSTRUCTION, SYSTEM_PROMPT
from tau2.config import DEFAULT_MAX_ERRORS, DEFAULT_MAX_STEPS
from tau2.data_model.message import AssistantMessage, ToolCall, ToolMessage
from tau2.data_model.simulation import RewardInfo, SimulationRun, TerminationReason
from tau2.data_model.tasks import Task as BenchmarkTask
from tau2.domains.airline.data_model import FlightDB
from tau2.domains.airline.tools import AirlineTools
from tau2.environment.environment import Environment
from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation
from tau2.orchestrator.orchestrator import Orchestrator, Role
from tau2.registry import registry

from trainer.data import Message, Outcome, Task, Tool
from trainer.envs.tau3_airline.user_simulators import MakeUserSimulator
from trainer.errors import EnvironmentBroken

T = TypeVar("T")
TOO_BIG = "**"  # `calculate` evaluates powers, and 9**9**9 would never come back


class Airline:
    """The airline of one data folder, also known to the benchmark's registry under `name`."""

    def __init__(self, folder: Path):
        self.name = f"airline of {folder}"
        self.policy = (folder / "policy.md").read_text(encoding="utf-8")
        self._db = (folder / "db.json").read_bytes()
        self.tools: list[Tool] = [tool.openai_schema for tool in self.world().get_tools()]
        registry.register_domain(self.world, self.name)

    def world(self, solo_mode: bool = False) -> Environment:
        """A fresh world; nothing is shared between two."""
        tools = AirlineTools(FlightDB.model_validate_json(self._db))
        return Environment(domain_name="airline", policy=self.policy, tools=tools, solo_mode=solo_mode)


airline = functools.cache(Airline)
read_task = BenchmarkTask.model_validate


class Relay(BaseAgent):  # type: ignore[misc]
    """An agent that returns the messages that it was given."""

    def __init__(self) -> None:
        self.next: Any = None

    def get_init_state(self, message_history: Any = None) -> None:
        return None

    def generate_next_message(self, message: Any, state: Any) -> tuple[Any, Any]:
        return self.next, state

    def stop(self, message: Any = None, state: Any = None) -> None: ...


class Tau3AirlineEnvironment:
    """One live conversation. World, user simulator and evaluator block, so every call runs in a thread of `pool`."""

    def __init__(self, home: Airline, make_user: MakeUserSimulator, pool: Executor, waits_for: str = ""):
        self.waits_for = waits_for
        self._home, self._make_user, self._pool = home, make_user, pool
        self._run: Any = None

    async def reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        return await self._threaded(self._reset, task)

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        return await self._threaded(self._step, message)

    async def outcome(self) -> Outcome:
        return await self._threaded(self._outcome)

    async def close(self) -> None:
        if self._run is not None:
            self._run.user.hang_up()
        self._run = None

    async def _threaded(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _reset(self, task: Task) -> tuple[list[Message], list[Tool]]:
        given = task.data["task"]
        self._run = run = Orchestrator(
            "airline",
            Relay(),
            self._make_user(given),
            self._home.world(),
            given,
            max_steps=DEFAULT_MAX_STEPS,
            max_errors=DEFAULT_MAX_ERRORS,
        )
        run.initialize()
        run.step()  # the user answers the greeting
        system = SYSTEM_PROMPT.format(agent_instruction=AGENT_INSTRUCTION, domain_policy=self._home.policy)
        return [{"role": "system", "content": system}, *map(_openai, run.trajectory)], list(self._home.tools)

    def _step(self, message: Message) -> tuple[list[Message], bool]:
        run = self._live()
        if run.done:  # the user hung up at the greeting, or this is a step too many
            return [], True
        try:
            turn = _benchmarks(message)
        except ValueError as error:  # nothing of it is carried out
            return [_refused(call, str(error)) for call in message["tool_calls"]], False
        if not (turn.has_text_content() or turn.is_tool_call()):
            run.done, run.termination_reason = True, TerminationReason.AGENT_ERROR
            return [], True
        run.agent.next = turn
        known = len(run.trajectory)
        run.step()  # the policy speaks
        if run.to_role != Role.ENV:
            self._limit(run)
        if not run.done:
            run.step()  # the tools or the user answer
            self._limit(run)
        return [_openai(m) for m in run.trajectory[known + 1 :]], run.done

    @staticmethod
    def _limit(run: Any) -> None:
        """The limits that `Orchestrator.run` keeps whenever no tool is waiting."""
        for reason, reached in (
            (TerminationReason.MAX_STEPS, run.step_count >= run.max_steps),
            (TerminationReason.TOO_MANY_ERRORS, run.num_errors >= run.max_errors),
        ):
            if reached:
                run.done, run.termination_reason = True, reason

    def _live(self) -> Any:
        if self._run is None:
            raise EnvironmentBroken("tau3_airline: step or outcome before reset")
        return self._run

    def _outcome(self) -> Outcome:
        """The benchmark's reward. An unended conversation fails, as in the benchmark at its limit of steps."""
        run = self._live()
        reason = run.termination_reason or TerminationReason.MAX_STEPS
        simulation = SimulationRun(
            id="",
            task_id=run.task.id,
            start_time="",
            end_time="",
            duration=0.0,
            termination_reason=reason,
            messages=run.trajectory,
        )
        found = evaluate_simulation(simulation, run.task, EvaluationType.ALL, False, self._home.name)
        success = found.reward >= 1
        details = {"termination": reason.value, **_labels(found)}
        return Outcome(float(found.reward), details, success=success, reason="" if success else reason.value)


def _labels(found: RewardInfo) -> dict[str, Any]:
    """What the evaluator saw, as labels: no gold action or answer among them."""
    return {name.value.lower(): value for name, value in (found.reward_breakdown or {}).items()}


def _benchmarks(message: Message) -> AssistantMessage:
    """The policy's message as the benchmark's.

    Raises:
        ValueError: a call that cannot be made.
    """
    calls = [_call(call) for call in message.get("tool_calls") or []]
    return AssistantMessage(role="assistant", content=message.get("content"), tool_calls=calls or None)


def _call(call: Mapping[str, Any]) -> ToolCall:
    arguments = call["function"].get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_no_number)
        except ValueError as error:
            raise ValueError(f"the arguments are not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError("the arguments must be an object")
    name = call["function"]["name"]
    if name == "calculate" and TOO_BIG in str(arguments.get("expression")):
        raise ValueError(f"{TOO_BIG} is not an operator here")
    return ToolCall(id=call.get("id", ""), name=name, arguments=arguments)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _refused(call: Mapping[str, Any], problem: str) -> Message:
    return {"role": "tool", "tool_call_id": call.get("id", ""), "content": f"Error: {problem}"}


def _openai(message: Any) -> Message:
    if isinstance(message, ToolMessage):
        return {"role": "tool", "tool_call_id": message.id, "content": message.content}
    return {"role": message.role, "content": message.content}
