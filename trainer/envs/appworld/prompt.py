"""The policy's prompt, in our own words, and how its code is found in its answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
# in the benchmark's own agent, "```python" at the end of a line. It closes one where it begins or ends a line: inside a
# line it is part of the code.
BLOCK = re.compile(
    r"(?:^[ \t]*```([^`\n]*)|```python[ \t]*\r?)\n(.*?)(?:^[ \t]*```[^\n]*|```[ \t]*\r?$|\Z)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)


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
    found = BLOCK.findall(content) if isinstance(content, str) else []
    blocks = [code for name, code in found if name.strip().lower() in PYTHON]
    return (blocks[0].strip(), len(blocks) > 1) if blocks else ("", False)


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def observation(output: str, more: bool) -> Message:
    note = f"\n{ONLY_FIRST}" if more else ""
    return {"role": "user", "content": f"Output:\n{output.rstrip()}{note}"}
