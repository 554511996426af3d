"""The gate: a warm start is fit for the method only if its teacher reads references.

On the tasks of `dev` for which simulated siblings come out mixed, the policy plays without a reference, with the true
one, with that of another task and with an empty shell. The true one must lift success by 20 points, another task's must
lower it, an empty shell must leave it alone; and values must be copied right.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from scripts.warmstart.demonstrations import Recipe, attempt, demonstrations, reference_of
from sgcd_kernels import output_head
from trainer.chat.compact import CompactRenderer
from trainer.concurrency import run_together
from trainer.config import EnvConfig
from trainer.data import Group, Message, Sampling, Task, TokenClass, Tool
from trainer.engines.hf import HFEngine
from trainer.envs.workday.environment import WorkdaySuite
from trainer.learning.model import hidden_states
from trainer.learning.packing import right_pad
from trainer.learning.sft import Example
from trainer.references.contrast import EMPTY_SHELL
from trainer.rollout.episode import RolloutSetup
from trainer.rollout.siblings import run_group

MAX_LENGTH = 512


class Prompted(CompactRenderer):
    """A renderer whose every prompt carries one reference: the teacher, made to act."""

    def __init__(self, plain: CompactRenderer, reference: str) -> None:
        self.__dict__.update(plain.__dict__)
        self.reference = reference

    def prompt(self, messages: list[Message], tools: list[Tool], reference: str = "") -> list[int]:
        return super().prompt(messages, tools, self.reference)


@dataclass(frozen=True)
class Gate:
    """Success rates (0 to 1) of the four prompts, on the same tasks, and the copying of values."""

    dev: float  # the student on the whole split
    dev_mixed: float  # share of dev groups of 8 that come out mixed
    student: float
    true_reference: float
    wrong_task: float
    empty_shell: float
    argument_accuracy: float
    tasks: int
    failures: dict[str, int]  # what went wrong on dev, by machine label

    def verdicts(self) -> dict[str, bool]:
        return {
            "dev success between 25 % and 60 %": 0.25 <= self.dev <= 0.60,
            "most dev groups mixed": self.dev_mixed > 0.5,
            "true reference at least 20 points above student": self.true_reference >= self.student + 0.20,
            "wrong task's reference below student": self.wrong_task < self.student,
            "empty shell within 5 points of student": abs(self.empty_shell - self.student) <= 0.05,
            "argument accuracy above 90 %": self.argument_accuracy > 0.90,
        }


def references(tasks: list[Task], seed: int) -> dict[str, str]:
    """Task id -> the reference that sixteen simulated workers leave behind, where they come out mixed."""
    rng = random.Random(f"gate/{seed}")
    written = {task.id: reference_of([attempt(task, rng, Recipe()) for _ in range(16)]) for task in tasks}
    return {name: found[0] for name, found in written.items() if found}


def measure(model: Any, renderer: CompactRenderer, *, samples: int = 8, seed: int = 0) -> Gate:
    """Play the gate's rollouts, `samples` a task and prompt."""
    suite = WorkdaySuite()
    tasks = suite.tasks("dev")
    written = references(tasks, seed)
    chosen = [task for task in tasks if task.id in written]
    shifted = chosen[len(chosen) // 2 :] + chosen[: len(chosen) // 2]
    strangers = {a.id: written[b.id] for a, b in zip(chosen, shifted)}

    def play(which: list[Task], texts: dict[str, str]) -> list[Group]:
        return asyncio.run(_play(model, renderer, suite, which, texts, samples, seed))

    def success(groups: list[Group]) -> float:
        return fmean(r.reward for g in groups for r in g.rollouts)

    plain = play(tasks, {})
    failed = [str(r.details["label"]) for g in plain for r in g.rollouts if r.reward == 0]
    return Gate(
        dev=success(plain),
        dev_mixed=fmean(g.mixed for g in plain),
        student=success([g for g in plain if g.task.id in written]),
        true_reference=success(play(chosen, written)),
        wrong_task=success(play(chosen, strangers)),
        empty_shell=success(play(chosen, dict.fromkeys(written, EMPTY_SHELL))),
        argument_accuracy=argument_accuracy(model, renderer, seed),
        tasks=len(chosen),
        failures={kind: sum(f.startswith(kind) for f in failed) for kind in sorted({f.split(":")[0] for f in failed})},
    )


async def _play(
    model: Any,
    renderer: CompactRenderer,
    suite: WorkdaySuite,
    tasks: list[Task],
    texts: dict[str, str],
    samples: int,
    seed: int,
) -> list[Group]:
    engine = HFEngine(model, slots=128, stop_ids=renderer.stop_ids, max_length=MAX_LENGTH, seed=seed)
    sampling, env = Sampling(max_tokens=64), EnvConfig(max_turns=32)

    def setup(task: Task) -> RolloutSetup:
        prompted = Prompted(renderer, texts.get(task.id, ""))
        return RolloutSetup(engine, suite, prompted, sampling, env, MAX_LENGTH)

    return await run_together(run_group(setup(task), task, samples) for task in tasks)


@torch.no_grad()
def argument_accuracy(model: Any, renderer: CompactRenderer, seed: int, count: int = 200) -> float:
    """Share of argument tokens that greedy decoding gets right, on demonstrations never trained on."""
    head, right, total = output_head(model), 0, 0
    for shown in demonstrations(count, renderer, Recipe(), seed + 1_000):
        wanted = torch.tensor(argument_positions(shown, renderer))
        ids = right_pad([shown.ids], renderer.pad_id)
        guessed = head.logits(hidden_states(model, ids)[0][wanted - 1]).argmax(-1)
        right += int((guessed == ids[0][wanted]).sum())
        total += len(wanted)
    return right / total


def argument_positions(shown: Example, renderer: CompactRenderer) -> list[int]:
    """Return where the worker says an argument's name or value; fillers and answers are not arguments."""
    found: list[int] = []
    for mine, turn in itertools.groupby(range(len(shown.ids)), key=lambda i: shown.loss_mask[i]):
        positions = list(turn)
        if mine:
            classes = renderer.classes([shown.ids[i] for i in positions])
            found += [i for i, kind in zip(positions, classes) if kind == TokenClass.ARGUMENT]
    return found
