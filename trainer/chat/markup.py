"""Keeps a tokenizer's control tokens apart from text that merely spells them.

Every added token of a tokenizer is a control token, special or not: Qwen's `<tool_call>` and `<think>` are not special,
and a tokenizer makes one id of them wherever it reads them, also with special tokens switched off. Here text from
outside cannot become one, because the two never meet as text:

- A renderer *marks* what it writes itself: in a marked text each control token is one private character.
- Text from outside is never marked, and is encoded by a copy of the tokenizer that has no control tokens.

So nothing is searched for in data, and nothing in it is lost: the same characters come back when the ids are decoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from trainer.errors import UserError
from trainer.text import encodable

PRIVATE = 0x100000  # the first character of Unicode's last plane, private like all of it: what stands for tokens
ESCAPE = "\U0010ffff"  # before a character of that plane in data, which is then shown as one of the plane before
_LAST_PLANE = re.compile("[\U00100000-\U0010ffff]")
_ESCAPED = re.compile(ESCAPE + "([\U000f0000-\U000fffff])")


class Markup:
    """The control tokens of `tokenizer`.

    Raises:
        UserError: the tokenizer is not a BPE of the `tokenizers` library.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.items()
        self.ids = {str(token): int(i) for i, token in added if is_control(str(token), token.special)}
        texts = sorted(self.ids, key=len, reverse=True)  # as the tokenizer does, the longest that matches
        self._stand_ins = {text: chr(PRIVATE + n) for n, text in enumerate(texts)}
        self._text_of = {char: text for text, char in self._stand_ins.items()}
        self._control = re.compile("|".join(map(re.escape, texts)) or NOTHING)
        self._marks = re.compile(f"([{''.join(self._text_of)}])" if texts else NOTHING)
        self._plain = _without(tokenizer, frozenset(self.ids.values()))

    def mark(self, own: str) -> str:
        """A renderer's own text, marked: the control tokens that it spells are meant."""
        return self._control.sub(lambda match: self._stand_ins[match.group()], own)

    def data(self, value: Any) -> Any:
        """Text from outside as it stands in a marked text; nested data too, keys included."""
        return each_text(lambda text: _LAST_PLANE.sub(lambda m: ESCAPE + chr(ord(m.group()) - 0x10000), text), value)

    def encode(self, marked: str) -> list[int]:
        """The ids of a marked text: control tokens where it is marked, and nowhere else."""
        ids: list[int] = []
        for part in self._marks.split(marked):
            if part in self._text_of:
                ids.append(self.ids[self._text_of[part]])
            elif part:
                ids += self.encode_data(_restore(part))
        return ids

    def encode_data(self, text: str) -> list[int]:
        """The ids of text from outside, whatever it spells."""
        ids: list[int] = self._plain.encode(encodable(text), add_special_tokens=False).ids
        return ids

    def spell(self, marked: str) -> str:
        """A marked text with its control tokens spelled out."""
        return _restore(self._marks.sub(lambda match: self._text_of[match.group()], marked))


NOTHING = r"(?!)"  # a pattern without a match


def is_control(text: str, special: bool) -> bool:
    """Whether an added token is more than a word or white space, which some tokenizers add as well."""
    return special or bool(re.search(r"[^\w\s]", text))


def each_text(change: Callable[[str], str], value: Any) -> Any:
    """`change` every text in nested data, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {each_text(change, key): each_text(change, item) for key, item in value.items()}
    return [each_text(change, item) for item in value] if isinstance(value, (list, tuple)) else value


def _restore(escaped: str) -> str:
    return _ESCAPED.sub(lambda match: chr(ord(match.group(1)) + 0x10000), escaped)


def _without(tokenizer: Any, ids: frozenset[int]) -> Any:
    """A copy of the tokenizer that gives none of `ids`: no text is one of these tokens, and no merge makes one."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    if parts["model"].get("type") != "BPE":
        raise UserError(f"model.renderer: needs a BPE tokenizer.json, got a {type(tokenizer).__name__} without one")
    parts |= {"truncation": None, "padding": None, "post_processor": None}
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] not in ids]
    model = parts["model"]
    vocabulary, gone = model["vocab"], {text for text, i in model["vocab"].items() if i in ids}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    model["vocab"] = {_UNSPEAKABLE + text if text in gone else text: i for text, i in vocabulary.items()}
    model["merges"] = [pair for pair in pairs if gone.isdisjoint([*pair, "".join(pair)])]
    if model["unk_token"] in gone:  # GPT-2's is <|endoftext|>; a byte that such a vocabulary lacks is left out
        model["unk_token"] = None
    return Tokenizer.from_str(json.dumps(parts))


_UNSPEAKABLE = "\0"  # byte-level alphabets have another character for this byte
