"""From a YAML file and the command line to a `Config`, and the config kept in a run directory.

Every mistake ends as one `UserError` that names the key and the remedy. What needs no model of the config (a missing
file, broken YAML, a dangling override) is found before `trainer.config`, and with it torch, is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trainer import files, yaml_files
from trainer.errors import UserError, UserErrors

if TYPE_CHECKING:
    from trainer.config import Config

BASE = "base"  # a file may say `base: other.yaml` and then hold only what differs
RESOLVED = "config.yaml"  # in a run directory
MAX_BASES = 16
MAX_NAME = 255  # characters of a file's name, as most file systems have it

# A run may be continued with other values of these: they change how long it lasts, what it reports and how its writer
# is reached, not its steps.
FREE = frozenset(
    {
        "output_dir",
        "model.made_by",
        "max_steps",
        "resume_from_checkpoint",
        "eval_steps",
        "eval_on_start",
        "save_steps",
        "save_total_limit",
        "trace_steps",
        "trace_total_limit",
        "report_to",
        "engine.urls",
        "engine.python",
        "engine.timeout",
        "engine.vllm_enable_sleep_mode",
        "engine.max_retries",
        "writer.base_url",
        "writer.api_key_env",
        "writer.timeout",
        "writer.max_retries",
        "writer.concurrency",
    }
)


def load(source: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in `source` (a YAML file or a run directory) with `--key value` overrides, validated."""
    return validate(*_assemble(source, overrides))


def build(tree: dict[str, Any], overrides: Sequence[str]) -> Config:
    """The config of plain data that comes from no file, with `--key value` overrides, validated."""
    changes = parse_overrides(overrides)
    for key, value in changes:
        _assign(tree, key, value)
    return validate(tree, Path("command line"), frozenset(key for key, _ in changes))


def load_what_fits(source: Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """The same with defaults in the place of invalid values, and a line for each mistake: for `check`.

    Raises:
        UserError: the mistake cannot be removed with single keys, so that there is no config without it.
    """
    from trainer.config import Config

    tree, source, overridden = _assemble(source, overrides)
    mistakes: list[str] = []
    while True:
        try:
            return Config.model_validate(tree), mistakes
        except ValidationError as error:
            details = error.errors(include_url=False)
            mistakes += [line for d in details if (line := _describe_mistake(d, source, overridden)) not in mistakes]
            if not sum(_drop(tree, d["loc"], d["type"] in UNKNOWN) for d in details):
                raise UserErrors(mistakes) from None


def _drop(tree: dict[str, Any], place: Sequence[int | str], section: bool) -> bool:
    """Remove the key at `place` from `tree`, and a whole section only if `section`; return whether it did."""
    *sections, last = place or ("",)
    for name in sections:
        below = tree.get(name) if isinstance(name, str) else None
        if not isinstance(below, dict):  # inside a list, or of one kind among several
            return isinstance(name, str) and tree.pop(name, None) is not None
        tree = below
    if isinstance(last, str) and last in tree and (section or not isinstance(tree[last], dict)):
        del tree[last]
        return True
    return False


def _assemble(source: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Path, frozenset[str]]:
    """What `validate` takes: plain data, the file it came from, and the keys of the command line."""
    if _is_folder(source):
        run_dir, source = source, source / RESOLVED
        if not source.exists():
            raise UserError(f"{run_dir} is no run directory (it has no {RESOLVED}): give a YAML file or a run's folder")
        tree = {**_read_resolved(run_dir), "output_dir": str(run_dir)}  # a run may have been moved
    else:
        tree = _read(source)
    changes = parse_overrides(overrides)
    for key, value in changes:
        _assign(tree, key, value)
    return tree, source, frozenset(key for key, _ in changes)


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """`--a.b 2 --c=x` as [("a.b", 2), ("c", "x")]; values are YAML. Dashes inside a key count as underscores."""
    pairs: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"argument {word!r}: overrides are written --key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key}: needs a value, as in --{key} VALUE")
            text = rest.pop(0)
        key = key.replace("-", "_")
        for earlier, _ in pairs:
            if f"{earlier}.".startswith(f"{key}.") or f"{key}.".startswith(f"{earlier}."):
                again = "it" if key == earlier else f"--{earlier}"
                raise UserError(f"--{key}: {again} was given before; give each key once, or its section, but not both")
        try:
            pairs.append((key, yaml_files.parse(text)))
        except yaml.YAMLError as error:
            shown = repr(text if len(text) <= 60 else text[:57] + "...")
            why = str(error) if isinstance(error, yaml_files.Refusal) else "quote strings that hold : or brackets"
            raise UserError(f"--{key}: {shown} is not a YAML value ({why})") from None
    return pairs


def validate(tree: Mapping[str, Any], source: Path, overridden: Collection[str] = ()) -> Config:
    """A `Config` from plain data; mistakes become a `UserErrors` that says where each key was given."""
    from trainer.config import Config  # late: it needs torch

    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserErrors([_describe_mistake(d, source, overridden) for d in error.errors(include_url=False)]) from None


def _describe_mistake(detail: ErrorDetails, source: Path, overridden: Collection[str]) -> str:
    """One mistake, and where it was made."""
    from trainer.config import Config

    where = "command line" if any(_is_about(detail, key) for key in overridden) else source
    return f"{where}: {_explain(detail, Config)}"


def dump(config: Config) -> dict[str, Any]:
    """The whole config as plain data, as it is written into the run directory."""
    return config.model_dump(mode="json")


def claim(config: Config) -> None:
    """Write the config into its output directory, or refuse when another run lives there."""
    refuse_another(config)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    files.write(config.output_dir / RESOLVED, yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True))


def refuse_another(config: Config) -> None:
    """A `UserError` when the output directory holds a run whose steps another config made."""
    run_dir = config.output_dir
    metrics = run_dir / "metrics.jsonl"
    checkpoints = [name for name in files.names(run_dir / "checkpoints") if name.startswith("step_")]
    begun = bool(checkpoints) or (metrics.exists() and metrics.stat().st_size > 0)
    if not begun or not (run_dir / RESOLVED).exists():  # a run that failed before its first step is no run
        return
    refuse_difference(config, _read_resolved(run_dir), str(run_dir))


def refuse_difference(config: Config, tree: Mapping[str, Any], where: str) -> None:
    """A `UserError` when the plain config `tree`, found at `where`, made other steps than `config` would."""
    if not tree:
        return
    theirs, ours = dict(_flatten(tree)), dict(_flatten(dump(config)))
    for key in [*ours, *(k for k in theirs if k not in ours)]:
        if key in FREE or theirs.get(key, _ABSENT) == ours.get(key, _ABSENT):
            continue
        raise UserError(
            f"{where} holds another run: {key} is {_show(key, theirs.get(key, _ABSENT))} there and "
            f"{_show(key, ours.get(key, _ABSENT))} here; choose another --output_dir, or give that run's config"
        )


_ABSENT = object()
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's words for a key that is none


def _read_resolved(run_dir: Path) -> dict[str, Any]:
    """The config in a run directory. It is written whole, so an empty one is damaged."""
    tree = _read(run_dir / RESOLVED)
    if not tree:
        raise UserError(
            f"{run_dir / RESOLVED}: is empty, so it was damaged; put it back, or move it away and give the YAML file "
            "that the run was started with (checkpoints hold the config too, and another one is refused)"
        )
    return tree


def _read(path: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """One YAML mapping, laid over the file that its `base` names."""
    name = yaml_files.show(path)
    tree = yaml_files.read(path, _nearest_file(path))
    real = os.path.realpath(path)
    if real in seen:
        raise UserError(f"{name}: its `{BASE}` leads back to itself; remove one of the links")
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{name}: got a {type(tree).__name__}, needs a mapping of config keys to values")
    base = tree.pop(BASE, None)
    if base is None:
        return tree
    if not isinstance(base, str) or len(seen) >= MAX_BASES:
        need = "the name of one YAML file" if len(seen) < MAX_BASES else f"at most {MAX_BASES} files in a row"
        raise UserError(f"{name}: {BASE}: needs {need}")
    return _overlay(_read(path.parent / base, (*seen, real)), tree)


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the sections on the way."""
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"--{key}: {section} is a value, not a section")
    tree[leaf] = value


def _is_folder(path: Path) -> bool:
    """Whether there is such a folder; False for a name that no file can have."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _nearest_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if _is_folder(path.parent) else []
    close = difflib.get_close_matches(path.name[:MAX_NAME], names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else "; the ready-made ones are in configs/"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _keys(section: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a config may have."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        fields = {name: field.annotation for name, field in section.model_fields.items()}
    else:
        fields = {f.name: None for f in dataclasses.fields(section)}
    for name, kind in fields.items():
        kind = next((k for k in get_args(kind) if isinstance(k, type) and issubclass(k, BaseModel)), kind)  # X | None
        nested = isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind))
        yield from _keys(kind, f"{prefix}{name}.") if nested else [prefix + name]


def _nearest_key(key: str, known: Sequence[str]) -> str:
    """The key that was probably meant: the same leaf in another section, else the most similar spelling."""
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return same_leaf[0]
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return close[0]
    leaves = {k.rsplit(".", 1)[-1]: k for k in known}
    return leaves[(difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.0) or [next(iter(leaves))])[0]]


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """One mistake in words: the key, what it got, what it needs."""
    key = _dotted(detail)
    if detail["type"] in UNKNOWN:
        if not re.fullmatch(r"[\w.-]{1,100}", key):  # text of a file that is no config
            return "unknown key (not shown: it is no name); config keys are words"
        return f"unknown key {key!r}; did you mean {_nearest_key(key, list(_keys(model)))!r}?"
    message = detail["msg"]
    if detail["type"] == "invalid_key" or key.endswith(".[key]"):
        return f"{key.removesuffix('.[key]')}: is not a name; config keys are words, so quote it or write another"
    if detail["type"] in ("value_error", "assertion_error"):  # ours: it says itself what it got
        return ": ".join(part for part in (key, message.removeprefix("Value error, ")) if part)
    need = _NEED.get(detail["type"]) or message.removeprefix("Input should be ").partition(", unable")[0]
    hint = _hint(key, detail) if detail["type"] in ("literal_error", "enum") else ""
    return f"{key}: got {_show(key, detail['input'])}, needs {need[:1].lower() + need[1:]}{hint}"


def _hint(key: str, detail: ErrorDetails) -> str:
    """What a value that is not among the names of its key was probably meant to be."""
    from sgcd_kernels.core.spelling import explain_choice  # here, because both import torch
    from sgcd_kernels.core.surrogate import LOSSES_ELSEWHERE

    names = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
    return explain_choice(detail["input"], names, LOSSES_ELSEWHERE if key == "loss_type" else None)


_NEED = {  # where pydantic speaks of its own types
    "model_type": "a section with keys of its own",
    "dataclass_type": "a section with keys of its own",
    "list_type": "a list, such as [a, b]",
    "dict_type": "a section with keys of its own",
    "path_type": "a path, such as runs/mine (quote a number)",
    "int_from_float": "a whole number",
}


def _dotted(detail: ErrorDetails) -> str:
    return ".".join(str(part) for part in detail["loc"])


def _is_about(detail: ErrorDetails, override: str) -> bool:
    """Whether a mistake is about an overridden key: at it, inside it, or in a check of a section that names it."""
    key = _dotted(detail)
    if detail["type"] == "value_error" and (not key or override.startswith(f"{key}.")):
        inside = override.removeprefix(f"{key}.")
        return bool(re.search(rf"(?<![\w.]){re.escape(inside)}(?![\w.])", detail["msg"]))
    return f"{key}.".startswith(f"{override}.") or f"{override}.".startswith(f"{key}.")


def _show(key: str, value: Any) -> str:
    """A value for a message, cut short; what may be a secret is not shown."""
    if value is _ABSENT:
        return "not set"
    if "key" in key.rsplit(".", 1)[-1] or "url" in key:
        return "(not shown)"
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 60 else text[:57] + "..."
