"""Compile every Triton kernel for GPUs that need not be here: python -m bench.aot [--arch 90] [--kernel pair_stats].

What the compiler says of each kernel and configuration: registers, shared memory, stack, spills and matrix
instructions. It is evidence of what will run, not of how fast.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block, CUDA programming guide, table of limits
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
REGISTERS = 65_536  # of a multiprocessor
LISTS = ("target", "rows", "order", "block_tile", "block_start", "tile_stop")  # of int64
OPERANDS = ("x", "w", "y", "v", "bias", "teacher_bias")
ABSENT = ("temperature", "softcap", "bias", "teacher_bias", "peaks")  # in the plain call
AWKWARD = ("rows", "entropy", "d_entropy")  # what it may have besides, and words that fill no tile
STATISTICS = (
    "target temperature lse scale d_logp entropy d_entropy teacher_lse centre d_loss normalisers out peaks".split()
)
FLOATS = ("softcap", "beta")


HEADER = "| kernel | operands | target | tile | registers | shared, KB | stack | spilled bytes | matrix instructions |"


def kernels() -> dict[str, Any]:
    """By their names in the tables; `own_pair_stats` is the kernel of `pair_stats` for two weights."""
    from sgcd_kernels.triton import forward_kernels, grad_kernels, topk_kernels

    return {
        "head_stats": forward_kernels.head_stats_kernel,
        "pair_stats": forward_kernels.pair_stats_kernel,
        "own_pair_stats": forward_kernels.pair_stats_kernel,
        "mixture_stats": forward_kernels.mixture_stats_kernel,
        "chosen_logits": topk_kernels.chosen_logits_kernel,
        "logprob_grad": grad_kernels.logprob_grad_kernel,
        "distill_grad": grad_kernels.distill_grad_kernel,
    }


@dataclass(frozen=True)
class Call:
    """One way in which a kernel is called, and the configuration that it then has."""

    kernel: str
    dtype: str
    arch: int
    config: Any
    first: bool  # in its list: the configuration that runs
    rich: bool = False  # with bias, softcap and temperature; a JSD's gradient; top_k; and awkward
    awkward: bool = False  # with masked tokens, a gradient of the entropy, and words that fill no tile
    own: bool = False  # a teacher with a weight of its own


@dataclass(frozen=True)
class Row:
    """What the compiler says of one kernel."""

    call: Call
    registers: int
    shared: int
    stack: int
    spills: int
    matrix: int  # instructions

    def line(self) -> str:
        call, c = self.call, self.call.config
        how = ", options" if call.rich else ", uneven" if call.awkward else ""
        how += ", own weight" if call.own and call.kernel != "own_pair_stats" else ""
        tile = f"{c.tokens}x{c.words}x{c.depth} w{c.warps} s{c.stages}{' flat' if c.flat else ''}"
        return (
            f"| {call.kernel}{how} | {call.dtype} | sm_{call.arch} | "
            f"{tile}{'' if call.first else ' (to try)'} | {self.registers} | {self.shared / 1024:.0f} | {self.stack} | "
            f"{self.spills} | {self.matrix} {MATRIX[call.arch].split('.')[0]} |"
        )


def cases(
    kernel: str | None = None, arch: int | None = None, dtype: str | None = None, rich: bool | None = None
) -> list[Call]:
    """Every configuration of the tables, in every way in which it is called."""
    from sgcd_kernels.triton.configs import table_for

    out = []
    for name, a, d, r in itertools.product(kernels(), ARCHITECTURES, ("bf16", "fp16", "fp32"), (False, True)):
        if kernel in (None, name) and arch in (None, a) and dtype in (None, d) and rich in (None, r):
            table = table_for(4 if d == "fp32" else 2, r)
            if name == "chosen_logits":  # called with the configuration of `pair_stats` with options, or of its own
                configs = table["pair_stats"][a // 10] + table["own_pair_stats"][a // 10] if r else ()
            else:
                configs = table[name][a // 10]
            both = name in ("mixture_stats", "chosen_logits", "distill_grad")
            owns = (False, True) if both else (name == "own_pair_stats",)
            for (index, config), awkward, own in itertools.product(enumerate(configs), {r, True}, owns):
                out.append(Call(name, d, a, config, index == 0, r, awkward, own))
    return out


def signature_of(fn: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    grad = "grad" in fn.__name__
    types = {}
    for name in fn.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in OPERANDS or (grad and name == "out"):
            types[name] = f"*{dtype}"
        elif name in FLOATS:
            types[name] = "fp32"
        elif name in STATISTICS or name in LISTS:
            types[name] = "*i64" if name in LISTS else "*fp32"
        else:
            types[name] = "i32"
    return types


def compile_case(call: Call) -> Row:
    """Compile a call."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sgcd_kernels.triton.forward_kernels import VARYING

    fn, config = kernels()[call.kernel], call.config
    operand = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[call.dtype]
    values = {
        "SHARED": not call.own, "STACKED": config.stacked and not call.own and call.kernel != "chosen_logits",
        "EVEN_H": True, "EVEN_G": True,
        "EVEN_V": not call.awkward, "OPERAND": operand, "TEACHER_OPERAND": operand,
        "PRECISION": "tf32x3", "JSD": True, "KIND": "jsd" if call.rich else "reverse_kl", "FLAT": config.flat,
        "GUARDED": config.guarded,
        "T": config.tokens, "W": config.words, "K": config.depth,
    }  # fmt: skip
    constants = {name: value for name, value in values.items() if name in fn.arg_names}
    absent = () if call.rich else ABSENT if call.awkward else ABSENT + AWKWARD
    constants |= {name: None for name in absent if name in fn.arg_names}
    types = signature_of(fn, call.dtype, constants)
    aligned = [
        n for n, t in types.items() if t.startswith("*") or (t == "i32" and n not in (*VARYING, "entries", "slots"))
    ]
    attrs = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn, types, constants, attrs)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", call.arch, 32), options=options)
    usage, ptx = resource_usage(compiled.asm["cubin"]), compiled.asm["ptx"]
    return Row(
        call, usage["REG"], compiled.metadata.shared, usage["STACK"], usage["LOCAL"] + local_bytes(ptx),
        ptx.count(MATRIX[call.arch]),
    )  # fmt: skip


def local_bytes(ptx: str) -> int:
    """Arrays in local memory that the front end made; what the assembler spills is in the stack."""
    return sum(int(size) for size in re.findall(r"\.local .*?\[(\d+)\]", ptx))


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the one kernel in a binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)
    return {name: int(value) for name, value in found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--kernel", choices=list(kernels()))
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--plain", action="store_true", help="only the plain call of each configuration")
    args = parser.parse_args()
    print(HEADER)
    print("|---|---|---|---|---|---|---|---|---|")
    failed = 0
    for call in cases(args.kernel, args.arch, args.dtype):
        if args.plain and (call.awkward or (call.own and call.kernel != "own_pair_stats")):
            continue
        try:
            print(compile_case(call).line(), flush=True)
        except Exception as error:  # a case that does not compile is a row too, and the exit code says so
            failed = 1
            print(
                f"| {call.kernel} | {call.dtype} | sm_{call.arch} | {call.config} | {type(error).__name__}: {error} |"
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
