"""Prepare docstrings for the site: doctests become code, and lines such as `Cost: 1 U forward` a list (mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
LIST = re.compile(r"^(?!- )(.*\S)\n(?=- )", re.MULTILINE)  # Markdown wants an empty line before a list
FACT = re.compile(r"^(Gradients|Backends|Cost): (.*)$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """A griffe extension; mkdocstrings reads what it leaves."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = FACT.sub(r"- *\1*: \2", LIST.sub(r"\1\n\n", obj.docstring.value))
            obj.docstring.value = DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", text)
