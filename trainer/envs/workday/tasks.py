"""Tasks from seeds. A scenario is one template (or chain of templates) three times, each time under other conditions.

`train`, `dev` and `test_normal` hold single errands and chains of two from one half of all ordered pairs;
`test_challenge` holds only chains that never occur there: pairs of the other half, and chains of three.
`warm` is endless and feeds the demonstrations of the warm start; no seed of it occurs in another split.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from trainer.data import Task, TaskClass
from trainer.envs.workday.errands import Part
from trainer.envs.workday.gold import solve
from trainer.envs.workday.templates import TEMPLATES, draw
from trainer.envs.workday.world import PEOPLE, TOPICS

SPLITS = {"train": 90, "dev": 57, "test_normal": 168, "test_challenge": 417}  # AppWorld's sizes, all multiples of 3
VARIANTS = 3
NAMES = list(TEMPLATES)
ACTIONS = [name for name in NAMES if not TEMPLATES[name].asks]


def is_seen(first: str, second: str) -> bool:
    """Say whether the pair may occur outside `test_challenge`: one half of all ordered pairs, fixed."""
    return (NAMES.index(first) + NAMES.index(second)) % 2 == 1


def chain(rng: random.Random, split: str) -> tuple[str, ...]:
    """Draw the templates of one scenario; a question can only come last, because its answer ends the task."""
    if split == "test_challenge":
        if rng.random() < 1 / 3:
            return (*rng.sample(ACTIONS, 2), rng.choice(NAMES))
        return draw_pair(rng, seen=False)
    share_of_pairs = 1 / 2 if split.startswith("warm") else 1 / 3  # in a chain, values are harder to keep apart
    return draw_pair(rng, seen=True) if rng.random() < share_of_pairs else (rng.choice(NAMES),)


def draw_pair(rng: random.Random, seen: bool) -> tuple[str, str]:
    """Draw two different templates on the wanted side of the fence."""
    while True:
        first, second = rng.choice(ACTIONS), rng.choice(NAMES)
        if first != second and is_seen(first, second) == seen:
            return first, second


def draw_part(rng: random.Random, template: str, condition: int | None, people: list[str], topics: list[str]) -> Part:
    return Part(template, condition, rng.randrange(len(TEMPLATES[template].phrases)), draw(rng, people, topics))


def scenario(split: str, index: int) -> list[Task]:
    """Return the three tasks of scenario `index`: the same errands, other names, other conditions."""
    rng = random.Random(f"workday/{split}/{index}")
    templates = chain(rng, split)
    # The last errand takes three different conditions, so that no single habit solves a scenario.
    last = rng.sample([None, *range(len(TEMPLATES[templates[-1]].conditions))], VARIANTS)
    return [
        build_task(rng, split, f"{split}_{index:03d}", variant, templates, last[variant]) for variant in range(VARIANTS)
    ]


def build_task(
    rng: random.Random, split: str, scenario_id: str, variant: int, templates: tuple[str, ...], last: int | None
) -> Task:
    people, topics = rng.sample(PEOPLE, 4 * len(templates)), rng.sample(TOPICS, 3 * len(templates))
    parts = []
    for i, name in enumerate(templates):
        condition = last if i == len(templates) - 1 else rng.choice([None, *range(len(TEMPLATES[name].conditions))])
        parts.append(draw_part(rng, name, condition, people[4 * i : 4 * i + 4], topics[3 * i : 3 * i + 3]))
    data = {"seed": rng.getrandbits(32), "people": people, "topics": topics, "parts": parts}
    return Task(
        id=f"{scenario_id}_{variant + 1}",
        env="workday",
        split=split,
        scenario=scenario_id,
        task_class=task_class(data),
        instruction=" , then ".join(part.instruction() for part in parts),
        data=data,
    )


def task_class(data: Mapping[str, Any]) -> TaskClass:
    """A task that asks is `information`; one whose gold solution writes nothing is `no_action`."""
    if any(part.kind.asks for part in data["parts"]):
        return "information"
    return "state_changing" if solve(data).writes else "no_action"


def tasks(split: str, count: int | None = None) -> list[Task]:
    """Return the tasks of `split`; `count` is needed for `warm` alone."""
    size = SPLITS[split] if count is None else count
    return [task for index in range((size + VARIANTS - 1) // VARIANTS) for task in scenario(split, index)][:size]
