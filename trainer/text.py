"""Text from outside, made fit for every file, tokenizer and endpoint of a run.

JSON can spell half a surrogate pair ("\\ud83d"), and Python keeps it, but no tokenizer and no UTF-8 file takes it.
What a policy, an environment, a writer or a task says passes through here where it comes in.
"""

from __future__ import annotations

from typing import Any


def encodable(text: str) -> str:
    """`text` with surrogate pairs joined to their characters and every lone surrogate replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def encodable_data(value: Any) -> Any:
    """Nested dicts and lists with every text in them `encodable`, keys included; anything else is left as it is."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, dict):
        return {encodable_data(key): encodable_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encodable_data(item) for item in value]
    return value
