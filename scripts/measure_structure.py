"""Measure how the library hangs together: files that one call runs, import depth, argument lists, sizes.

    python scripts/measure_structure.py

Modules are discovered, not named, so the numbers of two trees can be compared.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sgcd_kernels"
BACKENDS = ("triton", "cpp", "torch")
INTEGRATIONS = f"{PACKAGE}.integrations"
# Places where code agrees with a list elsewhere by counting its elements.
COUNTED = {
    "(None,) * n": r"\(None,\) \* \d+",
    "*_, a, b = ...": r"^\s*\*_, .+ = ",
    "others[-n], inputs[-n]": r"\b(others|inputs)\[-",
}
Graph = dict[str, set[str]]


class Function(NamedTuple):
    """A function as it is written."""

    place: str  # module:line
    name: str
    parameters: list[str]
    lines: int  # without its docstring
    is_kernel: bool  # of Triton, whose parameters are what a launch passes


def main() -> int:
    sources = read_sources()
    for backend in BACKENDS:
        files = files_run(backend)
        print(f"files whose code runs for one linear_divergence call on {backend}: {len(files)}")
        print(f"    {' '.join(files)}")
    graph = import_graph(sources)
    chain, circles = longest_chain(graph)
    print(f"import depth: {len(chain)}")
    print(f"    {' > '.join(name.removeprefix(f'{PACKAGE}.') for name in chain)}")
    print(f"import circles: {', '.join(' = '.join(circle) for circle in circles) or 'none'}")
    print("public signatures, number of parameters")
    for name, (count, keywords) in sorted(public_signatures().items(), key=lambda item: -item[1][0]):
        print(f"    {count:3} {name}" + (f", the last **options with {keywords} keywords" if keywords else ""))
    functions = [f for module, source in sources.items() for f in find_functions(module, ast.parse(source))]
    host = [f for f in functions if not f.is_kernel]
    print("longest parameter lists, Triton's kernels left out")
    for f in sorted(host, key=lambda f: -len(f.parameters))[:12]:
        print(f"    {len(f.parameters):3} {f.name} ({f.place})")
    print(f"functions with a parameter softcap: {sum('softcap' in f.parameters for f in functions)}", end="")
    print(f", without Triton's kernels {sum('softcap' in f.parameters for f in host)}")
    print("agreement by counting positions")
    for name, places in counted_positions(sources).items():
        print(f"    {len(places):3} {name}: {' '.join(places) or '-'}")
    for title, chosen in (("host function, without docstring", host), ("function, without docstring", functions)):
        longest = max(chosen, key=lambda f: f.lines)
        print(f"longest {title}: {longest.lines} lines, {longest.name} ({longest.place})")
    largest = max(sources, key=lambda module: len(sources[module].splitlines()))
    print(f"longest file: {len(sources[largest].splitlines())} lines, {largest}")
    print(f"{len(sources)} files, {sum(len(source.splitlines()) for source in sources.values())} lines")
    return 0


def read_sources(folder: Path = ROOT / PACKAGE) -> dict[str, str]:
    """Module name -> source."""
    files = sorted(folder.rglob("*.py"))
    return {module_of(file.relative_to(folder.parent)): file.read_text(encoding="utf-8") for file in files}


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# In a process of its own, as Triton's interpreter must be chosen before its kernels are imported. The first call loads
# and compiles; the second is what is measured, in all threads. A kernel under `triton.jit` runs in the interpreter.
CALL = """
import json, sys, threading
import torch
from sgcd_kernels import backend_status, linear_divergence
backend = sys.argv[1]
g = torch.Generator().manual_seed(0)
student, teacher, weight = (torch.randn(n, 8, generator=g) for n in (4, 4, 20))
targets = torch.tensor([1, 2, 3, 4])
def call():
    linear_divergence(student, weight, targets, teacher, impl=backend)
if not backend_status()[backend].usable:
    sys.exit(f"{backend} cannot be measured: {backend_status()[backend].reason}")
call()
files = set()
def note(frame, event, argument):
    if event == "call":
        files.add(frame.f_code.co_filename)
threading.setprofile(note)
sys.setprofile(note)
call()
sys.setprofile(None)
print(json.dumps(sorted(files)))
"""


def files_run(backend: str) -> list[str]:
    """The package's files whose code runs in a call on a backend."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CALL, backend], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    folder = ROOT / PACKAGE
    found = [Path(file) for file in json.loads(done.stdout)]
    return sorted(str(file.relative_to(folder)) for file in found if file.is_relative_to(folder))


def import_graph(sources: dict[str, str]) -> Graph:
    """Module -> the modules of the package that it imports, or names in a string, anywhere but under TYPE_CHECKING.

    Integrations are left out. A package that is only passed through on the way to one of its modules does not count.
    """
    modules = {name for name in sources if not f"{name}.".startswith(f"{INTEGRATIONS}.")}
    return {name: set(_named(name, ast.parse(sources[name]), modules, sources)) - {name} for name in sorted(modules)}


def _named(module: str, tree: ast.Module, modules: set[str], sources: dict[str, str]) -> Iterator[str]:
    for node in _walk_at_run_time(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = _base_of(node, module, sources)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                if whole in modules or base in modules:
                    yield whole if whole in modules else base
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in modules - {PACKAGE}:
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            pattern = "".join(re.escape(str(x.value)) if isinstance(x, ast.Constant) else r"\w+" for x in node.values)
            yield from (name for name in modules if pattern.startswith(PACKAGE) and re.fullmatch(pattern, name))


def _base_of(node: ast.ImportFrom, module: str, sources: dict[str, str]) -> str:
    """The absolute name behind `from ... import`."""
    if not node.level:
        return node.module or ""
    is_package = any(name.startswith(f"{module}.") for name in sources)
    parents = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _walk_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children: Iterable[ast.AST] = node.orelse
    else:
        yield node
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from _walk_at_run_time(child)


def longest_chain(graph: Graph) -> tuple[list[str], list[tuple[str, ...]]]:
    """(the longest chain of imports, the circles). A circle counts as all of its modules, one after another."""
    component: dict[str, tuple[str, ...]] = {}
    reached = {name: _reachable(graph, name) for name in graph}
    for name in graph:
        component[name] = tuple(sorted({name} | {other for other in reached[name] if name in reached[other]}))
    chains: dict[tuple[str, ...], list[str]] = {}

    def chain_from(members: tuple[str, ...]) -> list[str]:
        if members not in chains:
            nexts = {component[other] for name in members for other in graph[name]} - {members}
            chains[members] = [*members, *max((chain_from(n) for n in sorted(nexts)), key=len, default=[])]
        return chains[members]

    longest = max((chain_from(members) for members in sorted(set(component.values()))), key=len, default=[])
    return longest, sorted({members for members in component.values() if len(members) > 1})


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph[name]
    return seen


def public_signatures() -> dict[str, tuple[int, int]]:
    """Of each public function and of a public module's __init__ and forward: parameters, and keys of its **keywords."""
    import sgcd_kernels

    out: dict[str, tuple[int, int]] = {}
    for name in sgcd_kernels.__all__:
        value = getattr(sgcd_kernels, name)
        if inspect.isfunction(value):
            out[name] = _count(value)
        elif inspect.isclass(value) and hasattr(value, "forward"):
            for method in ("__init__", "forward"):
                out[f"{name}.{method}"] = _count(getattr(value, method))
    return out


def _count(function: Callable[..., object]) -> tuple[int, int]:
    """(parameters without self, keys of `**options: Unpack[TypedDict]`)"""
    hints, parameters = typing.get_type_hints(function), dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    keywords = [typing.get_args(hints.get(k)) for k, v in parameters.items() if v.kind is v.VAR_KEYWORD]
    return len(parameters), sum(len(typing.get_type_hints(found[0])) for found in keywords if found)


def find_functions(module: str, tree: ast.Module) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            a = node.args
            every = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs]
            every += [a.kwarg] if a.kwarg else []
            jit = any("jit" in ast.unparse(decorator).split("(")[0].split(".") for decorator in node.decorator_list)
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            yield Function(f"{module}:{node.lineno}", node.name, [x.arg for x in every], lines, jit)


def counted_positions(sources: dict[str, str]) -> dict[str, list[str]]:
    """Pattern -> the places where it occurs, module:line."""
    return {
        name: [
            f"{module.removeprefix(f'{PACKAGE}.')}:{number}"
            for module, source in sources.items()
            for number, line in enumerate(source.splitlines(), 1)
            for _ in re.finditer(pattern, line)
        ]
        for name, pattern in COUNTED.items()
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # this checkout, not a package that is installed
    sys.exit(main())
