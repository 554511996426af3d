"""Which JSON values a parameter's schema allows, as far as it decides how a text is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

TYPES = {  # the types of JSON, and the names that tools from Python and elsewhere give them
    "string": ("string", "str", "text", "char", "varchar"),
    "integer": ("integer", "int", "long"),
    "number": ("number", "float", "double", "decimal"),
    "boolean": ("boolean", "bool"),
    "null": ("null", "none", "nonetype"),
    "array": ("array", "list", "tuple", "set"),
    "object": ("object", "dict", "map"),
}
_JSON_NAMES = {name: kind for kind, names in TYPES.items() for name in names}


def allows(schema: Any, value: Any, root: Any = None, followed: frozenset[str] = frozenset()) -> bool:
    """Whether `schema` allows `value`, by type, nullable, const, enum, anyOf, oneOf, allOf and $ref.

    What a schema says of the inside of a value (items, lengths, patterns) is left to the environment, whose error names
    it. `root` is the document that "#/..." refers to. A reference that leads nowhere, or to itself, forbids nothing.
    """
    if isinstance(schema, bool) or not isinstance(schema, Mapping):
        return schema is not False
    if schema.get("nullable") is True and value is None:
        return True
    types = schema.get("type")
    types = [types] if isinstance(types, str) else types
    if isinstance(types, list) and types and not any(_is(value, name) for name in types):
        return False
    if "const" in schema and not _equal(value, schema["const"]):
        return False
    if isinstance(schema.get("enum"), list) and not any(_equal(value, one) for one in schema["enum"]):
        return False
    for key in ("anyOf", "oneOf"):
        ways = [one for one in _list(schema, key) if not (isinstance(one, Mapping) and one.get("$ref") in followed)]
        if ways and not any(allows(one, value, root, followed) for one in ways):
            return False
    if not all(allows(one, value, root, followed) for one in _list(schema, "allOf")):
        return False
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in followed:
        return allows(resolve(reference, root), value, root, followed | {reference})
    return True


def properties(schema: Any, root: Any, followed: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The schema of each named property of an object, through allOf, anyOf, oneOf and $ref."""
    if not isinstance(schema, Mapping):
        return {}
    own = schema.get("properties")
    found = dict(own) if isinstance(own, Mapping) else {}
    parts = [properties(one, root, followed) for one in _list(schema, "allOf")]
    for key in ("anyOf", "oneOf"):
        ways: dict[str, list[Any]] = {}
        for one in _list(schema, key):
            for name, node in properties(one, root, followed).items():
                ways.setdefault(name, []).append(node)
        parts.append({name: {"anyOf": nodes} for name, nodes in ways.items()})
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in followed:
        parts.append(properties(resolve(reference, root), root, followed | {reference}))
    for part in parts:
        for name, node in part.items():
            found[name] = {"allOf": [found[name], node]} if name in found else node
    return found


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    found = schema.get(key)
    return found if isinstance(found, list) else []


def _is(value: Any, name: Any) -> bool:
    """Whether `value` is of the type `name`; a name that is not in `TYPES` allows any."""
    name = _JSON_NAMES.get(name.lower()) if isinstance(name, str) else None
    if name is None:
        return True
    if isinstance(value, bool):
        return bool(name == "boolean")
    if isinstance(value, (int, float)):
        return name == "number" or (name == "integer" and value == int(value))
    kinds: dict[str, type] = {"string": str, "null": type(None), "array": list, "object": dict}
    return name in kinds and isinstance(value, kinds[name])


def _equal(one: Any, other: Any) -> bool:
    """Equality of JSON, where true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def resolve(reference: str, root: Any) -> Any:
    """What a reference within `root` points at, or True, which allows everything."""
    if not reference.startswith("#"):
        return True
    found = root
    for part in filter(None, unquote(reference[1:]).split("/")):
        key = re.sub("~[01]", lambda match: "~/"[int(match.group()[1])], part)
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return True
    return found
