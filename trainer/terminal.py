"""What is printed: text from endpoints, tools and files without its control characters.

An escape sequence in an endpoint's answer or in a file's name could rewrite the screen, the window's title or the
clipboard; a bidirectional mark could show a line as another. Everything that this package prints goes through
`visible`, which shows such characters as their code points.
"""

from __future__ import annotations

import logging
import sys
import traceback
import unicodedata
from types import TracebackType
from typing import TextIO

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # categories: control, format, surrogates, private, line breaks


def visible(text: str) -> str:
    """`text` with every control character but line breaks and tabs as `\\x1b` or `\\u202e`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in "\n\t" or not _hidden(char) else _code(char) for char in text)


def _hidden(char: str) -> bool:
    return unicodedata.category(char) in HIDDEN


def _code(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode()


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line, on stdout by default."""
    print(visible(str(text)), file=file or sys.stdout, flush=file is not None)


def guard() -> None:
    """Let warnings and tracebacks of this process be shown as `visible` shows them."""

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return visible(super().format(record))

    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)

    def show(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        say("".join(traceback.format_exception(kind, error, at)).rstrip("\n"), sys.stderr)

    sys.excepthook = show
