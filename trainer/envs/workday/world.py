"""The world: seven small apps over one state, and the tools that read and change it.

The state is plain nested dicts so that two worlds compare with `==`: that comparison is the verifier.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data import Tool

PEOPLE = (
    "ada amir anna ben bo carl chen clara dana dev ed eli emma eva finn gus hana hugo ines ivan "
    "jack jia june kai kim lara leo lin mara max mia nina noor omar pia raj rosa sam tess zoe"
).split()
TOPICS = (
    "audit budget campaign census contract course demo event forecast grant hiring inventory launch "
    "lease logo merger patent pilot pricing release research safety survey training"
).split()
FILES = [f"f{i:02d}" for i in range(30)]
DAYS = "mon tue wed thu fri".split()
HOURS = list(range(8, 18))
AMOUNTS = list(range(20, 80))
BOSS, TEAM = "boss", "team"

State = dict[str, Any]
Args = dict[str, Any]


class ToolError(Exception):
    """The tool refused: unknown name, missing argument. The policy sees the text."""


@dataclass(frozen=True)
class Spec:
    """One tool: what it does to the state, and its schema."""

    run: Callable[..., dict[str, Any]]
    doc: str
    parameters: Mapping[str, str]  # argument -> description
    writes: bool


SPECS: dict[str, Spec] = {}


def tool(doc: str, *, writes: bool = False, **parameters: str) -> Callable[[Callable[..., dict[str, Any]]], Any]:
    """Register the decorated function `f(state, **arguments) -> observation` as a tool."""

    def register(run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        SPECS[run.__name__] = Spec(run, doc, parameters, writes)
        return run

    return register


def look(table: Mapping[Any, Any], key: Any) -> Any:
    """Return the record, or refuse in words the policy can read."""
    if key not in table:
        raise ToolError("not found")
    return table[key]


DONE = {"ok": "yes"}


@tool("Look up a person.", name="person")
def contacts_get(state: State, name: str) -> dict[str, Any]:
    return dict(look(state["contacts"], name))


@tool("Block a person.", writes=True, name="person")
def contacts_block(state: State, name: str) -> dict[str, Any]:
    look(state["contacts"], name)["trust"] = "blocked"
    return DONE


@tool("Read the latest mail of a sender.", sender="person")
def mail_find(state: State, sender: str) -> dict[str, Any]:
    return dict(look(state["mail"], sender))


@tool("Send a mail.", writes=True, to="person", subject="what it is about")
def mail_send(state: State, to: str, subject: str) -> dict[str, Any]:
    state["sent"].append([to, subject])
    return DONE


@tool("Flag a sender's mail as suspicious.", writes=True, sender="person")
def mail_flag(state: State, sender: str) -> dict[str, Any]:
    look(state["mail"], sender)["mailbox"] = "flagged"
    return DONE


@tool("Archive a sender's mail.", writes=True, sender="person")
def mail_archive(state: State, sender: str) -> dict[str, Any]:
    look(state["mail"], sender)["mailbox"] = "archive"
    return DONE


@tool("Find the meeting with a person.", person="person")
def calendar_find(state: State, person: str) -> dict[str, Any]:
    return dict(look(state["events"], person))


@tool("See whether a day has room for one more meeting.", day="weekday")
def calendar_day(state: State, day: str) -> dict[str, Any]:
    return {"day": look(state["days"], day)}


@tool("Book a meeting.", writes=True, person="with whom", day="weekday", hour="hour")
def calendar_book(state: State, person: str, day: str, hour: int) -> dict[str, Any]:
    state["bookings"].append([person, day, hour])
    return DONE


@tool("Move the meeting with a person.", writes=True, person="with whom", day="weekday", hour="hour")
def calendar_move(state: State, person: str, day: str, hour: int) -> dict[str, Any]:
    look(state["events"], person).update(day=day, hour=hour)
    return DONE


@tool("Cancel the meeting with a person.", writes=True, person="with whom")
def calendar_cancel(state: State, person: str) -> dict[str, Any]:
    look(state["events"], person)
    del state["events"][person]
    return DONE


@tool("See whether a person is away, and who stands in.", name="person")
def away_get(state: State, name: str) -> dict[str, Any]:
    return dict(look(state["away"], name))


@tool("See whether a meeting room is free on a day.", day="weekday")
def rooms_state(state: State, day: str) -> dict[str, Any]:
    return {"room": look(state["rooms"], day)}


@tool("Book the meeting room.", writes=True, day="weekday", hour="hour")
def rooms_book(state: State, day: str, hour: int) -> dict[str, Any]:
    state["room_bookings"].append([day, hour])
    return DONE


@tool("Find the file of a topic.", topic="topic")
def files_find(state: State, topic: str) -> dict[str, Any]:
    return {"file": look(state["topic_file"], topic)}


@tool("See the status and owner of a file.", file="file name")
def files_info(state: State, file: str) -> dict[str, Any]:
    record = look(state["files"], file)
    return {"status": record["status"], "owner": record["owner"]}


@tool("Share a file with somebody.", writes=True, file="file name", to="person or team")
def files_share(state: State, file: str, to: str) -> dict[str, Any]:
    look(state["files"], file)["shared"].append(to)
    return DONE


@tool("Make a backup copy of a file.", writes=True, file="file name")
def files_copy(state: State, file: str) -> dict[str, Any]:
    look(state["files"], file)
    state["copies"].append(file)
    return DONE


@tool("Delete a file.", writes=True, file="file name")
def files_delete(state: State, file: str) -> dict[str, Any]:
    look(state["files"], file)
    del state["files"][file]
    return DONE


@tool("See whether a person has been paid.", name="person")
def wallet_history(state: State, name: str) -> dict[str, Any]:
    return {"payment": look(state["paid"], name)}


@tool("See whether the monthly spending limit is still open.")
def wallet_limit(state: State) -> dict[str, Any]:
    return {"limit": state["limit"]}


@tool("Pay a person.", writes=True, to="person", amount="whole units")
def wallet_pay(state: State, to: str, amount: int) -> dict[str, Any]:
    state["payments"].append([to, amount])
    return DONE


@tool("Request money from a person.", writes=True, person="person", amount="whole units")
def wallet_request(state: State, person: str, amount: int) -> dict[str, Any]:
    state["requests"].append([person, amount])
    return DONE


@tool("Read the house rule about a topic.", topic="topic")
def notes_read(state: State, topic: str) -> dict[str, Any]:
    return dict(look(state["notes"], topic))


@tool("Write a note about a topic.", writes=True, topic="topic", text="one word")
def notes_write(state: State, topic: str, text: str) -> dict[str, Any]:
    look(state["notes"], topic)["text"] = text
    return DONE


@tool("Find the open work on a topic.", topic="topic")
def todo_find(state: State, topic: str) -> dict[str, Any]:
    return dict(look(state["todo"], topic))


@tool("Give the work on a topic to a person.", writes=True, topic="topic", to="person")
def todo_assign(state: State, topic: str, to: str) -> dict[str, Any]:
    look(state["todo"], topic)["owner"] = to
    return DONE


@tool("Close the work on a topic.", writes=True, topic="topic")
def todo_close(state: State, topic: str) -> dict[str, Any]:
    look(state["todo"], topic)["work"] = "closed"
    return DONE


INTEGER_ARGUMENTS = frozenset({"hour", "amount"})


def schemas() -> list[Tool]:
    """Return every tool in the OpenAI form."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": spec.doc,
                "parameters": {
                    "type": "object",
                    "properties": {
                        argument: {"type": "integer" if argument in INTEGER_ARGUMENTS else "string", "description": doc}
                        for argument, doc in spec.parameters.items()
                    },
                    "required": list(spec.parameters),
                },
            },
        }
        for name, spec in SPECS.items()
    ]


def act(state: State, name: str, arguments: Args) -> dict[str, Any]:
    """Run one tool on `state`; a policy's mistake comes back as {"error": ...} and changes nothing."""
    spec = SPECS.get(name)
    if spec is None:
        return {"error": f"unknown tool {name}"}
    if set(arguments) != set(spec.parameters):
        return {"error": f"{name} needs {' '.join(spec.parameters) or 'nothing'}"}
    for key, value in arguments.items():
        wanted = int if key in INTEGER_ARGUMENTS else str
        if type(value) is not wanted:
            return {"error": f"{key} must be {'a number' if wanted is int else 'a word'}"}
    try:
        return spec.run(state, **arguments)
    except ToolError as problem:
        return {"error": str(problem)}


def build(rng: random.Random, people: list[str], topics: list[str]) -> State:
    """Return an ordinary day: everybody trusted and present, nothing paid, every day open. Conditions come on top."""
    files = rng.sample(FILES, len(topics))
    return {
        "contacts": {p: {"role": rng.choice(["client", "vendor", "staff"]), "trust": "trusted"} for p in people},
        "mail": {p: {"subject": rng.choice(["invoice", "hello"]), "amount": rng.choice(AMOUNTS)} for p in people},
        "sent": [],
        "events": {p: {"day": rng.choice(DAYS), "hour": rng.choice(HOURS)} for p in people},
        "days": dict.fromkeys(DAYS, "open"),
        "bookings": [],
        "away": {p: {"away": "no"} for p in people},
        "rooms": dict.fromkeys(DAYS, "free"),
        "room_bookings": [],
        "topic_file": dict(zip(topics, files, strict=True)),
        "files": {f: {"status": "final", "owner": rng.choice(people), "shared": []} for f in files},
        "copies": [],
        "paid": dict.fromkeys(people, "unpaid"),
        "limit": "open",
        "payments": [],
        "requests": [],
        "notes": {t: {"rule": "allow"} for t in topics},
        "todo": {t: {"owner": rng.choice(people), "work": "closed"} for t in topics},
    }
