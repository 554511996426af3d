"""The bytes behind the tokens of a byte-level BPE, so that text can be cut at any token.

A character may span tokens; decoding token by token would show replacement marks where the whole text has none.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from trainer.errors import UserError


def _alphabet() -> dict[str, int]:
    """Printable stand-in -> byte, as byte-level BPE vocabularies have used it since GPT-2."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(others)}}


class ByteLevel:
    """Token ids to text for `tokenizer`.

    Raises:
        UserError: the vocabulary is not byte-level.
    """

    def __init__(self, tokenizer: Any):
        alphabet = _alphabet()
        special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._bytes: dict[int, bytes] = {}
        for token, i in vocabulary.items():
            if token in special or not all(char in alphabet for char in token):
                self._bytes[i] = token.encode()
            else:
                self._bytes[i] = bytes(alphabet[char] for char in token)
        if "Ġ" not in vocabulary and "Ċ" not in vocabulary:
            raise UserError("model.renderer: chatml needs a byte-level BPE tokenizer, and this one is not")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token completes; concatenated they are `decode(ids)`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        last = len(ids) - 1
        return [decoder.decode(self._bytes.get(token, b""), n == last) for n, token in enumerate(ids)]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes.get(token, b"") for token in ids).decode("utf-8", "replace")
