"""The measurements, on small packages whose numbers are known."""

from __future__ import annotations

import ast
from textwrap import dedent

from scripts.measure_structure import counted_positions, find_functions, import_graph, longest_chain

SOURCES = {
    "sgcd_kernels": "from sgcd_kernels.op import run\nfrom sgcd_kernels import types",
    "sgcd_kernels.op": dedent("""
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from sgcd_kernels import unseen
        MODULES = {"fast": "sgcd_kernels.backends.fast"}
        def run():
            from sgcd_kernels import types
            return f"sgcd_kernels.lazy.{run}"
    """),
    "sgcd_kernels.types": "import torch",
    "sgcd_kernels.unseen": "",
    "sgcd_kernels.lazy": "",
    "sgcd_kernels.lazy.part": "from ..types import x",
    "sgcd_kernels.backends": "",
    "sgcd_kernels.backends.fast": "from . import slow\nfrom .slow import y",
    "sgcd_kernels.backends.slow": "from .. import types",
    "sgcd_kernels.integrations.host": "import sgcd_kernels",
}


def test_imports_are_found_wherever_they_hide() -> None:
    graph = import_graph(SOURCES)
    assert graph["sgcd_kernels"] == {"sgcd_kernels.op", "sgcd_kernels.types"}
    assert graph["sgcd_kernels.op"] == {"sgcd_kernels.types", "sgcd_kernels.backends.fast", "sgcd_kernels.lazy.part"}
    assert graph["sgcd_kernels.backends.fast"] == {"sgcd_kernels.backends.slow"}
    assert graph["sgcd_kernels.lazy.part"] == {"sgcd_kernels.types"}
    assert "sgcd_kernels.integrations.host" not in graph


def test_longest_chain_and_circles() -> None:
    chain, circles = longest_chain(import_graph(SOURCES))
    assert [name.rpartition(".")[2] for name in chain] == ["sgcd_kernels", "op", "fast", "slow", "types"]
    assert circles == []
    chain, circles = longest_chain({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()})
    assert chain == ["a", "b", "c", "d"]
    assert circles == [("b", "c")]


def test_functions() -> None:
    source = '''
@triton.jit
def kernel(x, y, BLOCK: tl.constexpr): pass

class Op:
    @staticmethod
    def run(a, /, b, *rest, softcap=None, **more):
        """Two lines
        of text."""
        return a
'''
    kernel, run = find_functions("m", ast.parse(source))
    assert (kernel.name, kernel.is_kernel, len(kernel.parameters)) == ("kernel", True, 3)
    assert run.parameters == ["a", "b", "rest", "softcap", "more"]
    assert (run.is_kernel, run.lines) == (False, 2)


def test_positions() -> None:
    source = "return (None,) * 24\n*_, beta, needs = others\nx = others[-1]\n(None,) * n\n"
    found = counted_positions({"sgcd_kernels.op": source})
    assert list(found.values()) == [["op:1"], ["op:2"], ["op:3"]]
