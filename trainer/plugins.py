"""Plug-ins: what a config names as `module:attribute`, or an installed package offers as an entry point.

Everything that may be a plug-in is found here: environments, writers, engines and reward functions. Whatever is wrong
with one is a `UserError` of one line that names the config's key, the plug-in, and what is needed.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from trainer.errors import ReportedError, UserError

ENVS, WRITERS, ENGINES, REWARDS = "sgcd.envs", "sgcd.writers", "sgcd.engines", "sgcd.rewards"  # groups of entry points


def is_path(name: str) -> bool:
    """Whether `name` is written as module:attribute, with dots inside the module."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), attribute])


def installed(group: str) -> list[EntryPoint]:
    """The plug-ins that installed packages offer in a group."""
    return sorted(entry_points(group=group), key=lambda point: point.name)


def is_known(name: str, group: str) -> bool:
    """Whether `name` may be a plug-in of the group: written as a path, or offered by an installed package."""
    return is_path(name) or any(point.name == name for point in installed(group))


def find(key: str, name: str, group: str) -> Any:
    """The object that `name` stands for: a path, or the name of an entry point of the group.

    Raises:
        UserError: it cannot be imported, is not there, or two packages offer it.
    """
    if is_path(name):
        return _import(key, name, name)
    points = {point.value: point for point in installed(group) if point.name == name}
    if len(points) > 1:
        raise UserError(f"{key}: {name!r} is offered twice, as {' and '.join(sorted(points))}; give one as {key}")
    if not points:
        raise UserError(f"{key}: nothing is called {name!r}; needs module:attribute, or an entry point of {group}")
    (value,) = points
    return _import(key, name, value.partition("[")[0].strip())


def _import(key: str, name: str, path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        without = f", written without .py: {module_name[:-3]}:{attribute}" if module_name.endswith(".py") else ""
        hint = f"; needs a module in the working directory or an installed package{without}" if absent else ""
        raise UserError(f"{key}: {name} cannot be imported ({explain(error, '' if absent else None)}){hint}") from error
    try:
        thing = module
        for part in attribute.split("."):
            thing = getattr(thing, part)
    except AttributeError:
        offered = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
        there = f"it defines {', '.join(offered[:8])}" if offered else "it defines nothing"
        raise UserError(
            f"{key}: {name} cannot be imported (AttributeError: {_place_of(module)} has no {attribute}; {there})"
        ) from None
    return thing


def _place_of(module: Any) -> str:
    """The file of a module: another one may have the name that was meant."""
    return str(getattr(module, "__file__", None) or f"the folder {module.__name__}")


def explain(error: BaseException, file: str | None = None) -> str:
    """`ValueError: why (my_module.py, line 12)`, on one line. `file`: prefer its frames; "" for no place at all."""
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:
        text = ""
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = [] if file == "" else traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file] or [
        frame for frame in frames if not frame.filename.startswith(("<frozen", str(Path(__file__).parent)))
    ]
    if not own or isinstance(error, SyntaxError) or f"{error.__class__.__module__}".startswith("trainer."):
        return what
    return f"{what} ({Path(own[-1].filename).name}, line {own[-1].lineno})"


def build(key: str, name: str, thing: Any, options: Mapping[str, Any], **offered: Any) -> Any:
    """`thing(**options)`, and with those of `offered` that it takes by name.

    Raises:
        UserError: it is no class or function, it does not take these options, or it raises.
    """
    if not callable(thing):
        raise UserError(f"{key}: {name} is a {type(thing).__name__}, needs a class, or a function that makes one")
    section = key.rpartition(".")[0]
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError) as error:  # a class of C without a signature
        raise UserError(f"{key}: {name} has no signature ({error}), needs a Python class or function") from None
    takes = signature.parameters.values()
    by_name = [p.name for p in takes if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind == p.VAR_KEYWORD for p in takes):
        for option in options:
            if option not in by_name or option in offered:
                own = [n for n in by_name if n not in offered]
                known = f"there are {', '.join(own)}" if own else "it takes none"
                raise UserError(f"{section}.options: {name} has no option {option!r}; {known}")
    given = {**{n: v for n, v in offered.items() if n in by_name}, **options}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise UserError(f"{section}.options: {name} cannot be made ({error})") from None
    try:
        made = thing(**given)
    except ReportedError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: {name} cannot be made ({explain(error, file_of(thing))})") from error
    if inspect.isawaitable(made):
        getattr(made, "close", lambda: None)()  # no warning about a coroutine that was never awaited
        raise UserError(f"{key}: {name} is asynchronous, needs a class or a plain function")
    return made


def file_of(thing: Any) -> str | None:
    """The file that defines an object, its class or its function."""
    try:
        return inspect.getfile(thing if inspect.isclass(thing) or inspect.isroutine(thing) else type(thing))
    except TypeError:
        return None


def wrong_method(thing: Any, name: str, arguments: int, *, asynchronous: bool = False) -> str:
    """What is wrong with a method that is called with so many positional arguments; "" for nothing."""
    kind = "async def" if asynchronous else "def"
    try:
        method: Any = getattr(thing, name, None)
    except Exception as error:
        return f"{name} cannot be read ({explain(error)})"
    if method is None:
        return f"has no method {name}, needs `{kind} {name}` with {_count(arguments)}"
    if not callable(method):
        return f"{name} is a {type(method).__name__}, needs `{kind} {name}` with {_count(arguments)}"
    try:
        inspect.signature(method).bind(*[None] * arguments)
    except TypeError as error:
        return f"{name} has another signature ({error}), needs `{kind} {name}` with {_count(arguments)}"
    except ValueError:
        pass
    if inspect.isasyncgenfunction(method) or inspect.isgeneratorfunction(method):
        return f"{name} is a generator, needs `{kind} {name}` that returns"
    if inspect.iscoroutinefunction(method) and not asynchronous:
        return f"{name} is async, needs a plain `def {name}`"
    return ""


def _count(arguments: int) -> str:
    return "no argument" if not arguments else "1 argument" if arguments == 1 else f"{arguments} arguments"


def check_methods(key: str, name: str, thing: Any, methods: Iterable[tuple[str, int, bool]]) -> None:
    """Refuse a plug-in of which a method (name, positional arguments, asynchronous) is absent or of another kind."""
    problems = [wrong_method(thing, method, n, asynchronous=a) for method, n, a in methods]
    if found := [problem for problem in problems if problem]:
        raise UserError(f"{key}: {name} {'; '.join(found)}")
