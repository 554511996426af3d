"""The benchmark's own files, read as they are: entries, gold calls and function documentation.

Everything comes from the `bfcl-eval` package (Apache-2.0). Its executor is not used: it evaluates model text and keeps
API objects in module globals.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data import Tool
from trainer.envs.bfcl.calls import Call, parse_call
from trainer.errors import UserError
from trainer.optional_packages import REMEDY

INSTALL = f"pip install {REMEDY['bfcl_eval']}"
CATEGORIES = ("base", "miss_func", "miss_param", "long_context")
# API class -> (module that holds it, file that documents its functions)
APIS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
SPLITS = {"train": 0.6, "dev": 0.2, "test": 0.2}  # shares of the entry numbers
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}  # the benchmark's names in JSON Schema


@dataclass(frozen=True)
class Entry:
    """One multi-turn conversation: what the user says turn by turn, the worlds it starts from, and the gold calls."""

    id: str
    category: str
    number: int  # the same in all four categories, which vary one conversation
    turns: tuple[str, ...]  # "" where the user only hands over the functions that were held back
    classes: tuple[str, ...]
    initial_config: Mapping[str, Any] = field(repr=False)
    excluded: frozenset[str]  # functions that are never shown
    held_back: Mapping[int, tuple[str, ...]]  # turn -> functions that are shown from that turn on
    gold: tuple[tuple[Call, ...], ...]


def folder() -> Path:
    """The package's data folder, found without importing the package.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"env.name: bfcl needs the benchmark package: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "data"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


@functools.cache
def entries(category: str) -> tuple[Entry, ...]:
    """All entries of one category, by number."""
    name = f"BFCL_v4_multi_turn_{category}.json"
    rows = _lines(folder() / name)
    gold = {row["id"]: row["ground_truth"] for row in _lines(folder() / "possible_answer" / name)}
    return tuple(_entry(category, row, gold[row["id"]]) for row in rows)


def _entry(category: str, row: Mapping[str, Any], gold: list[list[str]]) -> Entry:
    return Entry(
        id=row["id"],
        category=category,
        number=int(row["id"].rsplit("_", 1)[1]),
        turns=tuple("\n".join(m["content"] for m in turn) for turn in row["question"]),
        classes=tuple(row["involved_classes"]),
        initial_config=row["initial_config"],
        excluded=frozenset(row.get("excluded_function", ())),
        held_back={int(turn): tuple(names) for turn, names in row.get("missed_function", {}).items()},
        gold=tuple(tuple(parse_call(text) for text in turn) for turn in gold),
    )


@functools.cache
def split_of() -> dict[int, str]:
    """Entry number -> split. Numbers whose conversations start from the same world or request stay together."""
    families: dict[int, list[int]] = {}
    seen: dict[str, int] = {}
    for entry in entries("base"):
        keys = [json.dumps(entry.initial_config, sort_keys=True), entry.turns[0]]
        first = next((seen[key] for key in keys if key in seen), entry.number)
        families.setdefault(first, []).append(entry.number)
        for key in keys:
            seen.setdefault(key, first)
    total, place, split = sum(map(len, families.values())), 0, {}
    for first in sorted(families, key=_shuffled):
        for number in families[first]:
            split[number] = _split_at(place / total)
        place += len(families[first])
    return split


def _shuffled(number: int) -> str:
    return hashlib.sha256(f"bfcl multi-turn {number}".encode()).hexdigest()


def _split_at(share: float) -> str:
    for split, width in SPLITS.items():
        if share < width:
            return split
        share -= width
    return list(SPLITS)[-1]


@functools.cache
def documentation(api: str) -> tuple[Tool, ...]:
    """The functions of one API class as OpenAI tools."""
    rows = _lines(folder() / "multi_turn_func_doc" / f"{APIS[api]}.json")
    return tuple(
        {
            "type": "function",
            "function": {
                "name": row["name"],
                "description": row["description"].split("Tool description: ")[-1].strip(),
                "parameters": _schema(row["parameters"]),
            },
        }
        for row in rows
    )


def _schema(node: Mapping[str, Any]) -> dict[str, Any]:
    """The benchmark's parameter description as JSON Schema."""
    out = dict(node)
    out["type"] = TYPES.get(node["type"], node["type"])
    if out.get("default") == "None":
        out["default"] = None
    if "properties" in node:
        out["properties"] = {name: _schema(child) for name, child in node["properties"].items()}
    if "items" in node:
        out["items"] = _schema(node["items"])
    return out


def tools(entry: Entry) -> list[Tool]:
    """Every function of the entry's classes; those that are excluded or held back at first are marked "unlisted".

    An unlisted tool is not shown, but a call of it is carried out, as in the benchmark (one gold call does so).
    """
    hidden = entry.excluded.union(*(names for turn, names in entry.held_back.items() if turn > 0))
    found = [tool for api in entry.classes for tool in documentation(api)]
    return [{**tool, "unlisted": True} if tool["function"]["name"] in hidden else tool for tool in found]


def new_tools(entry: Entry, turn: int) -> list[Tool]:
    """What is handed over at the start of `turn`."""
    names = entry.held_back.get(turn, ())
    return [t for api in entry.classes for t in documentation(api) if t["function"]["name"] in names]
