"""The tiny policy's vocabulary and tokenizer, built from the world itself."""

from __future__ import annotations

import re
from typing import Any

from trainer.chat.compact import SPECIAL
from trainer.envs.workday.templates import TEMPLATES
from trainer.envs.workday.world import BOSS, DAYS, FILES, PEOPLE, SPECS, TEAM, TOPICS

FILLERS = ("ok", "now", "next", "so", "let me see", "well", "one moment")
REFERENCE_WORDS = "steps check avoid deviate after start answer .".split()
ANSWERS = "done flagged rejected refused waiting cancelled already kept answer none zero sorry".split()
SUBJECTS = (
    "fraud approval reject later file reschedule online unlock staffing handover invite invoice hello moved".split()
)
STATES = (
    "role client vendor staff trust trusted blocked subject amount away yes no deputy day open full hour "
    "room free taken file status final draft locked owner payment paid unpaid limit used rule allow deny "
    "text deleted work closed ok error not found unknown tool needs nothing must be a number word call "
    "without name pairs of argument and value inside"
).split()


def vocabulary() -> list[str]:
    """Return every word once, in a fixed order."""
    phrases = [word for t in TEMPLATES.values() for p in t.phrases for word in re.sub(r"{\w+}", "", p).split()]
    tools = [word for name, spec in SPECS.items() for word in (name, *spec.parameters)]
    numbers = [str(n) for n in range(100)]
    fillers = [word for filler in FILLERS for word in filler.split()]
    names = [*PEOPLE, BOSS, TEAM, *TOPICS, *FILES, *DAYS]
    words = [*SPECIAL, *tools, *names, *numbers, *phrases, ",", "then", *fillers]
    return list(dict.fromkeys([*words, *REFERENCE_WORDS, *ANSWERS, *SUBJECTS, *STATES]))


def tokenizer() -> Any:
    """Return the word-level tokenizer as transformers loads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<tool>", "<assistant>", "<ref>", "<call>"],
    )
