"""Demonstrations by hurried workers, as the tiny policy will read them.

A hurried worker skips a check more often than not and otherwise works as usual, so what the policy learns to
imitate is competent but careless: it knows every check, makes each of them sometimes, and fails where a skipped one
mattered. Some demonstrations carry a reference, written by the same contrast writer that training uses from eight
simulated siblings, and follow it: a teacher that cannot read a reference is useless. Fillers are drawn alike with and
without a reference, so style tells nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from scripts.warmstart.vocabulary import FILLERS
from trainer.chat.compact import CALL, END, CompactRenderer
from trainer.data import Message, Task
from trainer.envs.workday import tasks as catalogue
from trainer.envs.workday.errands import initial_state, plan
from trainer.envs.workday.gold import Step, follow, passes, solve
from trainer.envs.workday.world import DAYS, FILES, PEOPLE, SPECS, TOPICS
from trainer.learning.sft import Example
from trainer.references.contrast import ANSWER, EMPTY_SHELL, avoids, checks, deviation, format_reference


@dataclass(frozen=True)
class Recipe:
    """How careless the workers are, and how demonstrations are mixed. Fractions of 1."""

    skip: float = 0.65  # a check is not made
    hurried: float = 0.8  # of workers; the others make every check
    filler: float = 0.3  # calls that start with a filler
    with_reference: float = 0.4
    with_shell: float = 0.1  # an empty reference, followed by ordinary work


@dataclass(frozen=True)
class Attempt:
    steps: list[Step]
    answer: str
    passed: bool

    @property
    def path(self) -> tuple[str, ...]:
        return (*(step.call.name for step in self.steps), ANSWER)


def attempt(task: Task, rng: random.Random, recipe: Recipe) -> Attempt:
    """Let one worker do the task."""
    state = initial_state(task.data)
    hurried = rng.random() < recipe.hurried
    steps, answer = follow(plan(task.data), state, lambda step: not hurried or rng.random() >= recipe.skip)
    return Attempt(steps, answer, passes(task.data, solve(task.data), state, [step.made for step in steps], answer))


def reference_of(attempts: list[Attempt]) -> tuple[str, Attempt] | None:
    """Write the reference of simulated siblings and name the one it follows; None when they are not mixed.

    The same selection as the contrast writer: the shortest success gives the steps.
    """
    good = [a for a in attempts if a.passed]
    failures = [a.path for a in attempts if not a.passed]
    if not good or not failures:
        return None
    best = min(good, key=lambda a: (len(a.path), a.path))
    wrong = avoids([a.path for a in good], failures)
    leave = deviation([a.path for a in good], failures)
    return format_reference(best.path, checks(best.path, failures), wrong, leave), best


def example(
    task: Task, done: Attempt, renderer: CompactRenderer, rng: random.Random, filler: float, reference: str
) -> Example:
    """Spell one attempt as tokens; only the worker's words carry loss."""
    ids = renderer.prompt([{"role": "user", "content": task.instruction}], [], reference)
    mask = [False] * len(ids)

    def say(words: list[str], mine: bool) -> None:
        tokens = renderer.encode(words)
        ids.extend(tokens)
        mask.extend([mine] * len(tokens))

    for step in done.steps:
        opening = rng.choice(FILLERS).split() if rng.random() < filler else []
        arguments = [word for k, v in step.call.arguments.items() for word in (k, str(v))]
        say([*opening, CALL, step.call.name, *arguments, END], True)
        seen: Message = {"role": "tool", "content": json.dumps(step.seen)}
        tokens = renderer.observation([seen])
        ids.extend(tokens)
        mask.extend([False] * len(tokens))
    say([*done.answer.split(), END], True)
    return Example(ids, mask)


def drills(count: int, renderer: CompactRenderer, seed: int) -> list[Example]:
    """Return random names and numbers repeated once, with loss on the repetition.

    Copying a value out of an observation is what a random model learns last; this teaches it in a fifth of the time.
    """
    rng = random.Random(f"drills/{seed}")
    pool = renderer.encode([*PEOPLE, *TOPICS, *FILES, *DAYS, *map(str, range(100))])
    made = []
    for _ in range(count):
        words = [rng.choice(pool) for _ in range(rng.randint(4, 16))]
        made.append(Example(words + words, [False] * (len(words) + 1) + [True] * (len(words) - 1)))
    return made


def rote(count: int, renderer: CompactRenderer, seed: int) -> list[Example]:
    """Return nonsense work done to the letter of its reference, with loss on the tools' names.

    Only the reference tells which tool comes next, so it must be read; in real work it is a faint hint that a young
    model ignores.
    """
    rng = random.Random(f"rote/{seed}")
    names = [*PEOPLE, *TOPICS, *FILES, *DAYS]
    made = []
    for _ in range(count):
        tools = rng.choices(list(SPECS), k=rng.randint(2, 8))
        extra = rng.choices(list(SPECS), k=rng.randint(0, 3))
        reference = format_reference(
            tools, extra, rng.sample(list(SPECS), rng.randint(0, 2)), rng.choice([*tools, None])
        )
        ids = renderer.prompt(
            [{"role": "user", "content": " ".join(rng.choices(names, k=rng.randint(1, 4)))}], [], reference
        )
        mask = [False] * len(ids)
        for name in tools:
            values = [word for key in SPECS[name].parameters for word in (key, rng.choice(names))]
            seen = renderer.encode(["<tool>", "ok", "yes", END, "<assistant>"])
            ids += [*renderer.encode([CALL, name, *values, END]), *seen]
            mask += [True, True, *[False] * len(values), True, *[False] * len(seen)]
        ids += renderer.encode(["done", END])
        mask += [True, True]
        made.append(Example(ids, mask))
    return made


def demonstrations(
    count: int,
    renderer: CompactRenderer,
    recipe: Recipe,
    seed: int,
    on_step: Callable[[int], None] = lambda n: None,
) -> list[Example]:
    """Return `count` demonstrations on tasks of the endless `warm` split."""
    rng = random.Random(f"demonstrations/{seed}")
    made: list[Example] = []
    index = 0
    while len(made) < count:
        for task in catalogue.scenario(f"warm{seed}", index):
            kind, reference = rng.random(), ""
            done = attempt(task, rng, recipe)
            if kind < recipe.with_reference:
                written = reference_of([attempt(task, rng, recipe) for _ in range(8)])
                if written:
                    reference, done = written
            elif kind < recipe.with_reference + recipe.with_shell:
                reference = EMPTY_SHELL
            made.append(example(task, done, renderer, rng, recipe.filler, reference))
            on_step(len(made))
        index += 1
    return made[:count]
