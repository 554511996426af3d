"""What a finished rollout is worth, and which siblings count as successes.

The reward that trains is the verifier's, or the weighted sum of the config's `rewards`. Success is a judgement beside
it: references contrast successes with failures, and figures count them. It is `reward >= success_threshold` where the
config has one, else the verifier's own word where it gives one, else whether the rollout did better than the mean of
its group.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from statistics import fmean
from typing import TYPE_CHECKING

from trainer import plugins
from trainer.data import Outcome, Rollout
from trainer.errors import EnvironmentBroken, UserError, all_of

if TYPE_CHECKING:
    from trainer.config import RewardConfig

VERIFIER = "verifier"
LIMIT = 1e6  # beyond that, the mean and the deviation of a group lose the difference between siblings in fp32
FULL_REWARD = 1.0  # counts as success where nothing says otherwise and there are no siblings to compare with

Function = Callable[[Rollout], "float | Awaitable[float]"]


@dataclass(frozen=True)
class Reward:
    """One component of the reward: `function(rollout)`, or the environment's verifier where that is None."""

    name: str
    weight: float = 1.0
    function: Function | None = None


@dataclass(frozen=True)
class Grading:
    """How rollouts are graded: siblings in training, or (not `relative`) attempts of an evaluation, each by itself."""

    rewards: Sequence[Reward] = (Reward(VERIFIER),)
    success_threshold: float | None = None
    relative: bool = True  # without the verifier's word and a threshold, siblings are compared with each other

    async def grade(self, rollout: Rollout, outcome: Outcome, timeout: float) -> None:
        """Set the reward, its components and the verifier's word on success.

        Raises:
            EnvironmentBroken: a component raises, takes longer than `timeout` seconds, or gives no number in
                [-LIMIT, LIMIT].
        """
        rollout.details, rollout.reason = outcome.details, outcome.reason
        rollout.success = outcome.success
        rollout.reward = finite(outcome.reward, "the verifier's reward")  # what the functions see
        found = {r.name: await self._component(r, rollout, timeout) for r in self.rewards}
        rollout.reward = finite(sum(r.weight * found[r.name] for r in self.rewards), "the sum of rewards")
        rollout.components = found if len(found) > 1 or VERIFIER not in found else {}
        if self.success_threshold is not None:
            rollout.success = rollout.reward >= self.success_threshold

    def judge(self, rollouts: Sequence[Rollout]) -> None:
        """Decide the success of siblings of which neither the verifier nor a threshold said anything.

        A sibling succeeds if its reward is above the mean of the group: with rewards 0 and 1 these are the ones. Where
        all have the same reward, and in an evaluation, it needs `FULL_REWARD`.
        """
        rewards = [r.reward for r in rollouts]
        above, least = math.inf, FULL_REWARD
        if self.relative and len(set(rewards)) > 1:
            above, least = fmean(rewards), max(rewards)  # the best too: rounding can make it the mean
        for rollout in rollouts:
            if rollout.success is None:
                rollout.success = rollout.reward > above or rollout.reward >= least

    async def _component(self, reward: Reward, rollout: Rollout, timeout: float) -> float:
        if reward.function is None:
            return rollout.reward
        who = f"rewards: {reward.name}"
        try:
            return finite(await asyncio.wait_for(_call(reward.function, rollout, who), timeout), who)
        except asyncio.TimeoutError:
            raise EnvironmentBroken(f"{who} took longer than env.timeout = {timeout:g} s") from None


async def _call(function: Function, rollout: Rollout, who: str) -> object:
    """Call it in a thread, where it can block nobody, unless it is asynchronous. What it raises becomes
    `EnvironmentBroken` at once: StopIteration, SystemExit and TimeoutError mean something else to the event loop."""

    def call() -> object:
        with _named(who):
            return function(rollout)

    result = call() if inspect.iscoroutinefunction(function) else await asyncio.to_thread(call)
    with _named(who):
        return await result if inspect.isawaitable(result) else result


@contextmanager
def _named(who: str) -> Iterator[None]:
    try:
        yield
    except EnvironmentBroken:
        raise
    except (Exception, SystemExit) as error:  # a grader that runs a policy's code may meet its exit()
        raise EnvironmentBroken(f"{who}: {error!r}") from error


def finite(value: object, who: str) -> float:
    """`value` as a float; `EnvironmentBroken` where it is no number in [-LIMIT, LIMIT].

    Numbers are those of Python, and arrays and tensors of one real element.
    """
    try:
        kind = value.item() if hasattr(value, "item") else value
        number = float(value) if isinstance(kind, (Real, Decimal)) else math.nan  # type: ignore[arg-type]
    except Exception:  # a tensor of several elements, or without numbers; 10**400; whatever a class of one's own does
        number = math.nan
    if not -LIMIT <= number <= LIMIT:  # NaN too
        raise EnvironmentBroken(f"{who}: needs a number in [-{LIMIT:g}, {LIMIT:g}], got {_shown(value)}")
    return number


def _shown(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:
        return f"a {type(value).__name__}"


def load(configs: Sequence[RewardConfig], success_threshold: float | None) -> Grading:
    """Import the reward functions of a config.

    Raises:
        UserError: one line per function that cannot be imported or called, or name that occurs twice.
    """
    if not configs:
        return Grading(success_threshold=success_threshold)
    rewards: list[Reward] = []
    all_of(*(lambda c=c: rewards.append(_load_one(c)) for c in configs))
    names = [reward.name for reward in rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"rewards: {', '.join(twice)} occurs twice; give each a name of its own")
    return Grading(tuple(rewards), success_threshold)


def _load_one(config: RewardConfig) -> Reward:
    if config.path == VERIFIER:
        return Reward(config.name or VERIFIER, config.weight)
    function = plugins.find("rewards", config.path, plugins.REWARDS)
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        raise UserError(f"rewards: {config.path} must be a function of one rollout ({error})") from None
    return Reward(config.name or config.path.rpartition(":")[2], config.weight, function)
