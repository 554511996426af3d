"""The data that flows through one training step.

Messages and tools are plain dicts in the OpenAI chat format. Tokens are those that the engine sampled: text is never
tokenised again, so that training uses exactly `Rollout.ids`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trainer.text import encodable

if TYPE_CHECKING:
    from torch import Tensor

Message = dict[str, Any]  # OpenAI chat message: role, content, tool_calls, tool_call_id
Tool = dict[str, Any]  # OpenAI tool: {"type": "function", "function": {"name", "description", "parameters"}}
TaskClass = Literal["state_changing", "information", "transfer", "no_action"]


class TokenClass(enum.IntEnum):
    """The role of a generated token. Only metrics and the viewer use it, never a credit rule."""

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

    def __post_init__(self) -> None:
        for name in ("id", "env", "split", "scenario", "instruction"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"Task.{name} is {value!r:.60}, needs a string")
            object.__setattr__(self, name, encodable(value))


@dataclass(frozen=True)
class Outcome:
    """The verifier's verdict on a finished episode."""

    reward: float
    details: Mapping[str, Any] = field(default_factory=dict)  # machine labels; kept from policy and writer
    success: bool | None = None  # None: judged from the reward, as `trainer.rollout.rewards` says
    reason: str = ""  # why it failed, in a few words for who reads the run; kept from policy and writer


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
    components: Mapping[str, float] = field(default_factory=dict)  # of the reward, unweighted, where it is a sum
    success: bool | None = None  # None until it is judged
    reason: str = ""  # of a failure
    stop: str = ""  # "answer" | "max_turns" | "length" | "context" | "env_done" | "crashed"
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BugReport:
    """A rollout that broke by a fault in code: what is needed to bring the fault back."""

    task: str  # its id
    error: str
    traceback: str
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # everything after the prompt, as far as it came
    text: str = ""  # of `ids`
    messages: list[Message] = field(default_factory=list)  # after the prompt


@dataclass
class Group:
    """The siblings of one task, and the reference that was written from them."""

    task: Task
    rollouts: list[Rollout]
    reference: str = ""  # "" means none: the group trains with W = 1
    # writer, cached, tokens, seconds, error, sanitiser_hits
    reference_info: dict[str, Any] = field(default_factory=dict)
    broken: int = 0  # rollouts that broke, retried ones included
    problem: str = ""  # why the last of them broke
    bugs: list[BugReport] = field(default_factory=list)  # of those that broke by a fault in code

    @property
    def mixed(self) -> bool:
        """Siblings differ in reward: the group has advantages."""
        return len({r.reward for r in self.rollouts}) > 1

    @property
    def contrasts(self) -> bool:
        """Siblings differ, some succeeded and some failed: a reference can be written from them."""
        return self.mixed and len({bool(r.success) for r in self.rollouts}) > 1

    @property
    def no_contrast(self) -> str:
        """Why a mixed group gets no reference, as an error of `reference_info`; "" where it can get one."""
        if not self.mixed or self.contrasts:
            return ""
        return "all_succeeded" if self.rollouts[0].success else "all_failed"


@dataclass(frozen=True)
class Scored:
    """A rollout and the statistics of its tokens from the scoring pass; names as in `sgcd_kernels`.

    Tensors are [T], aligned with `rollout.ids`; at observed tokens they hold anything and are not read.
    """

    rollout: Rollout
    student_logp: Tensor
    teacher_logp: Tensor
    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    weights: Tensor
    saliency: Tensor  # in [0, 1]
    span_ids: Tensor  # the token's credit span, -1 outside every span
