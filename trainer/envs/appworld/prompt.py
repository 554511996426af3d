"""The policy's prompt, in our own words, and how its code is found in its answers."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.data import Message, Task

SYSTEM = """\
You get things done for a person, your supervisor, by writing Python. Their apps are reachable as `apis`: \
`apis.<app>.<function>(name=value, ...)` calls a function of an app and returns its result.

How it goes:
- Think briefly if you like, then write one block of code between ```python and ```. It runs at once, and what it \
prints is what you read next. Variables stay for later blocks. At most one block a message.
- Nothing is known in advance: look it up. `apis.api_docs.show_app_descriptions()` lists the apps, \
`apis.api_docs.show_api_descriptions(app_name="...")` the functions of one, and \
`apis.api_docs.show_api_doc(app_name="...", api_name="...")` says what a function takes and returns.
- Passwords, addresses and cards of your supervisor are in `apis.supervisor`. Most apps want a login first, and then \
the access token with every call. Long lists come in pages: read all of them.
- "My friends", "my family" and the like are contacts in the phone app. The date is what the world's clock says.
- Change only what the task asks you to change.
- When it is done, call `apis.supervisor.complete_task()`; if a question was asked, \
`apis.supervisor.complete_task(answer=...)` with nothing but the value."""

GIVE_UP = 'apis.supervisor.complete_task(status="fail")'
NO_CODE = "No code was found. Write one block that begins with ```python and ends with ```."
ONLY_FIRST = "Only the first block was run."
CRASHED = "The code ended the process that it ran in, and with it the episode."
PYTHON = ("", "python", "python3", "py")  # what an opening fence may name
# A fence opens a block where it begins a line, whatever it names, so that every closing fence is known for one; and, as
# in the benchmark's own agent, "```python" at the end of a line. A fence of as many backticks, or more, closes the
# block where it begins or ends a line. Inside a string or a comment of the code it is part of that: Python's grammar
# says where a string ends. Only where no other fence closes the block, one in a comment does.
OPENING = re.compile(r"(?:^[ \t]*(`{3,})([^`\n]*)|(`{3,})(python)[ \t]*\r?)\n", re.MULTILINE | re.IGNORECASE)
STRING = (
    r"'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"
    r'|"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
    r"|'[^'\\\n]*(?:\\.[^'\\\n]*)*'"
    r'|"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
)


@functools.cache
def _closings(ticks: int, python: bool) -> list[re.Pattern[str]]:
    """What closes a block whose fence has `ticks` backticks, best first, beside what to skip on the way there."""
    fence = rf"(?P<fence>^[ \t]*`{{{ticks},}}[^\n]*|`{{{ticks},}}[ \t]*\r?$)"
    comment = rf"#(?![^\n]*[^\s#`]`{{{ticks},}}[ \t]*\r?$)[^\n]*"  # "# done```" closes, "# ```" does not
    ways = [f"{fence}|{comment}|{STRING}", f"{fence}|{STRING}"] if python else [fence]
    return [re.compile(way, re.MULTILINE | re.DOTALL) for way in ways]


def first_messages(task: Task) -> list[Message]:
    who = task.data["supervisor"]
    user = (
        f"Your supervisor is {who['first_name']} {who['last_name']}, e-mail {who['email']}, "
        f"phone {who['phone_number']}.\n\nTask: {task.instruction}"
    )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def code_of(message: Mapping[str, Any]) -> tuple[str, bool]:
    """The first block of code that a message holds ("" for none), and whether more follow."""
    content = message.get("content")
    blocks = [code for name, code in _blocks(content) if name in PYTHON] if isinstance(content, str) else []
    return (blocks[0].strip(), len(blocks) > 1) if blocks else ("", False)


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Every block of `text`: what its fence names, and what stands in it."""
    at = 0
    while opening := OPENING.search(text, at):
        name = next(iter((opening[2] or opening[4] or "").lower().split()), "")  # attributes may follow it
        closings = _closings(len(opening[1] or opening[3]), name in PYTHON)
        fences = (m for closing in closings for m in closing.finditer(text, opening.end()) if m["fence"] is not None)
        found = next(fences, None)
        end, at = found.span() if found else (len(text), len(text))
        yield name, text[opening.end() : end]


def block(code: str) -> str:
    """`code` as a block, between fences longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}python\n{code}\n{fence}"


def observation(output: str, more: bool) -> Message:
    note = f"\n{ONLY_FIRST}" if more else ""
    return {"role": "user", "content": f"Output:\n{output.rstrip()}{note}"}
