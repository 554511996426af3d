"""Compile every Triton kernel for any GPU, without having one: python -m bench.aot [--arch 90] [--kernel pair_stats].

Prints the compiler's report of each kernel and configuration: registers, shared memory, stack, spills and matrix
instructions. It shows that kernels will run, not how fast.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100, 120)
# Bytes per block, CUDA programming guide, table of limits. Code for sm_80 also runs on sm_86 and sm_89: their limit.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TENSOR_MEMORY = 512  # columns
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
ABSENT = ("temperature", "softcap", "bias", "teacher_bias", "peaks")  # in calls without options
BESIDE = ("rows", "entropy", "d_entropy")  # also absent in the plain call
INT64 = ("targets", "rows", "turns", "cu_seqlens", "onsets")
OTHER_TYPES = {"beta": "fp32", "out_stride": "i32", "eligible": "*u8"}  # any other argument is a pointer to fp32
HEADER = (
    "| kernel | stored (multiplied) | target | tile | registers | shared, KB | stack | spilled bytes | "
    "matrix instructions |"
)


@dataclass(frozen=True)
class Mix:
    """Dtypes of a call: as stored, and as multiplied."""

    x: str
    w: str
    operand: str
    y: str = ""  # default: the student's
    v: str = ""
    teacher_operand: str = ""
    precision: str = "tf32x3"

    def of(self, name: str) -> str:
        return {
            "x": self.x, "w": self.w, "bias": self.w, "y": self.y or self.x, "v": self.v or self.w,
            "teacher_bias": self.v or self.w, "operand": self.operand, "out": self.operand,
            "teacher_operand": self.teacher_operand or self.operand,
        }[name]  # fmt: skip

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes of the widest dtype as multiplied, and as stored."""
        operands, stored = (self.of(n) for n in ("operand", "teacher_operand")), (self.of(n) for n in "xwyv")
        return max(4 if d == "fp32" else 2 for d in operands), max(4 if d == "fp32" else 2 for d in stored)

    def __str__(self) -> str:
        sides = ["/".join(dict.fromkeys(pair)) for pair in ((self.x, self.w), (self.of("y"), self.of("v")))]
        teacher = f" and {sides[1]}" if sides[1] != sides[0] else ""
        multiplied = self.precision if "fp32" in (self.operand, self.teacher_operand) else self.operand
        return f"{sides[0]}{teacher} ({multiplied})"


def same(dtype: str, precision: str = "tf32x3") -> Mix:
    return Mix(dtype, dtype, dtype, precision=precision)


BF16, FP16, FP32, TF32 = same("bf16"), same("fp16"), same("fp32"), same("fp32", "tf32")
MASTER, FP16_MASTER = Mix("bf16", "fp32", "bf16"), Mix("fp16", "fp32", "fp16")
WIDENED = Mix("bf16", "fp16", "fp32")
TEACHERS = (  # with a weight that is not the student's
    Mix("bf16", "bf16", "bf16", "fp32", "fp32", "fp32"),
    Mix("fp32", "fp32", "fp32", "bf16", "bf16", "bf16"),
    Mix("bf16", "bf16", "bf16", "bf16", "fp32", "bf16"),
    Mix("bf16", "bf16", "bf16", "fp16", "fp16", "fp16"),
)
PLAIN, UNEVEN, OPTIONS, OTHER = "plain", "uneven", "options", "options, not JSD"
# (dtypes, kind of call, whether rows are unaligned). An uneven call has masked tokens, a gradient of the entropy, and V
# and H that no tile size divides. A call with options has all that and bias, softcap, temperature, the top K, and a JSD
# or its gradient; with OTHER, TV or the gradient of a KL instead. Calls with a subset of these are not compiled.
WAYS: tuple[tuple[Mix, str, bool], ...] = (
    *((BF16, how, False) for how in (PLAIN, UNEVEN, OPTIONS)),
    *((FP16, how, False) for how in (UNEVEN, OPTIONS)),
    *((FP32, how, False) for how in (UNEVEN, OPTIONS)),
    (TF32, OPTIONS, False),
    *((MASTER, how, False) for how in (UNEVEN, OPTIONS)),
    (FP16_MASTER, OPTIONS, False),
    (WIDENED, OPTIONS, False),
    *((mix, how, True) for mix in (BF16, FP32) for how in (UNEVEN, OPTIONS)),
    (MASTER, OPTIONS, True),
    *((mix, OTHER, unaligned) for mix in (BF16, FP32, MASTER) for unaligned in (False, True)),
)


def kernels() -> dict[str, Any]:
    """The kernels by their names in the tables; `own_pair_stats` is the kernel of `pair_stats` with two weights."""
    from sgcd_kernels.backends.triton import credit, distill, divergence, logprob, topk

    return {
        "head_stats": logprob.head_stats_kernel,
        "pair_stats": divergence.pair_stats_kernel,
        "own_pair_stats": divergence.pair_stats_kernel,
        "mixture_stats": divergence.mixture_stats_kernel,
        "chosen_logits": topk.chosen_logits_kernel,
        "logprob_grad": logprob.logprob_grad_kernel,
        "distill_grad": distill.distill_grad_kernel,
        "scan": credit.scan_kernel,
    }


@dataclass(frozen=True)
class Call:
    """One kind of call of a kernel, with its configuration."""

    kernel: str
    mix: Mix
    arch: int
    config: Any  # None: the kernel has no tile
    first: bool = True  # of its list in the tables: the configuration that runs
    how: str = PLAIN
    unaligned: bool = False
    own: bool = False  # the teacher has another weight

    @property
    def plain(self) -> bool:
        """Whether the table in the documentation shows this call."""
        usual = self.how == (OPTIONS if self.kernel == "chosen_logits" else PLAIN)
        usual = usual and (self.mix is BF16 or self.config is None)
        return usual and self.first and not self.unaligned and self.own == (self.kernel == "own_pair_stats")


@dataclass(frozen=True)
class Row:
    """The compiler's report of one kernel."""

    call: Call
    registers: int
    shared: int
    stack: int
    spills: int
    matrix: int  # instructions
    tensor_memory: int  # columns

    def faults(self) -> list[str]:
        """Reasons why it would not run, or not fast."""
        limit = SHARED_LIMIT[self.call.arch]
        return [
            *([f"{self.shared} bytes of shared memory, and a block has {limit}"] if self.shared > limit else []),
            *(["too many columns of tensor memory"] if self.tensor_memory > TENSOR_MEMORY else []),
            *(["stack or spills"] if self.stack + self.spills else []),
            *(["no matrix instructions"] if self.call.config is not None and self.matrix == 0 else []),
        ]

    def line(self) -> str:
        call, c = self.call, self.call.config
        how = "" if call.how == PLAIN else f", {call.how}"
        how += (", unaligned rows" if call.unaligned else "") + (", own weight" if call.own else "")
        tile = f"{c.block_n}x{c.block_v}x{c.block_h} w{c.num_warps} s{c.num_stages}" if c else ""
        tile += " flatten" if c and c.flatten else ""
        return (
            f"| {call.kernel}{how} | {call.mix} | sm_{call.arch} | "
            f"{tile}{'' if call.first else ' (to try)'} | {self.registers} | {self.shared / 1024:.0f} | {self.stack} | "
            f"{self.spills} | {self.matrix} {MATRIX[call.arch].split('.')[0]} |"
        )


def cases(kernel: str | None = None, arch: int | None = None) -> list[Call]:
    """Every configuration of the tables, in the most demanding calls that use it."""
    out: list[Call] = []
    for name, target in itertools.product(kernels(), ARCHITECTURES):
        if kernel in (None, name) and arch in (None, target):
            out += cases_of(name, target)
    return list(dict.fromkeys(out))


def cases_of(name: str, arch: int) -> Iterator[Call]:
    if name == "scan":
        yield from (Call(name, FP32, arch, None, how=how) for how in (PLAIN, OPTIONS))
        return
    owns = (False, True) if name in ("mixture_stats", "chosen_logits", "distill_grad") else (name == "own_pair_stats",)
    for own in owns:
        teachers = tuple((mix, OPTIONS, False) for mix in TEACHERS) if own else ()
        again = own and name != "own_pair_stats"  # only the second product is new
        rare = (FP16, FP16_MASTER, WIDENED, TF32)
        for mix, how, unaligned in WAYS + teachers:
            if how == OTHER and name not in ("mixture_stats", "distill_grad"):
                continue
            if again and mix in rare:
                continue
            if how in (PLAIN, UNEVEN) and (name == "chosen_logits" or (again and mix is not BF16)):
                continue
            for index, config in enumerate(configurations(name, arch, mix, how, unaligned, own)):
                if index == 0 or (mix is BF16 and how != PLAIN):
                    yield Call(name, mix, arch, config, index == 0, how, unaligned, own)


def configurations(name: str, arch: int, mix: Mix, how: str, unaligned: bool, own: bool) -> tuple[Any, ...]:
    """The one that `launch.config_of` chooses for such a call, and the others to try."""
    from sgcd_kernels.backends.triton.launch import column_of, table_for

    operand, stored = mix.bytes
    table = table_for(operand, how in (OPTIONS, OTHER), stored > operand, unaligned)
    if name == "chosen_logits":
        name = "own_pair_stats" if own else "pair_stats"
    found: tuple[Any, ...] = table[name][column_of(table[name], arch // 10)]
    return found


def arguments_of(call: Call, fn: Any) -> tuple[dict[str, Any], dict[tuple[int, ...], Any]]:
    """(the types of a kernel's arguments by name, its constants by position, those inside of tuples too)"""
    constants = constants_of(call)
    types = types_of(call) | dict.fromkeys(constants, "constexpr")
    absent = {name for name, value in constants.items() if value is None}
    if "teacher_hidden" not in fn.arg_names:
        absent.add("teacher_bias")
    values: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(fn.arg_names):
        kind = types.setdefault(name, "*fp32")
        if name in constants:
            values[index,] = constants[name]
        elif isinstance(kind, tuple):
            without = [field for field in kind._fields if field in absent]  # type: ignore[attr-defined]
            types[name] = kind._replace(**dict.fromkeys(without, "constexpr"))  # type: ignore[attr-defined]
            values |= {(index, kind._fields.index(field)): None for field in without}  # type: ignore[attr-defined]
    return {name: types[name] for name in fn.arg_names}, values


def types_of(call: Call) -> dict[str, Any]:
    """The types of kernel arguments by name, in Triton's notation."""
    from sgcd_kernels.backends.protocol import DistillSaved
    from sgcd_kernels.backends.triton.launch import SIZES, Transform
    from sgcd_kernels.backends.triton.logprob import PerToken
    from sgcd_kernels.backends.triton.tiles import HeadPlaces
    from sgcd_kernels.backends.triton.topk import Blocks

    mix = call.mix
    student = HeadPlaces(f"*{mix.of('x')}", "i32", f"*{mix.of('w')}", "i32", "i32")
    teacher = HeadPlaces(f"*{mix.of('y')}", "i32", f"*{mix.of('v')}", "i32", "i32")
    return {
        **student._asdict(),
        **{f"teacher_{name}": kind for name, kind in teacher._asdict().items()},
        "transform": Transform._make((f"*{mix.of('bias')}", f"*{mix.of('teacher_bias')}", "fp32", "*fp32")),
        "per_token": PerToken._make(["*i64", *["*fp32"] * (len(PerToken._fields) - 1)]),
        "saved": DistillSaved._make(["*fp32"] * len(DistillSaved._fields)),
        "blocks": Blocks._make(["*i64"] * 4),
        "out": f"*{mix.of('out')}" if "grad" in call.kernel else "*fp32",
        **dict.fromkeys(SIZES, "i32"),
        **dict.fromkeys(INT64, "*i64"),
        **OTHER_TYPES,
    }


def constants_of(call: Call) -> dict[str, Any]:
    """The compile-time constants of a call by name: arguments of the kernel, or fields of its tuples."""
    import triton.language as tl

    from sgcd_kernels.backends.triton.launch import Meta

    if call.config is None:
        rules = {"START": 0.1, "RESET": 0.02, "PATIENCE": 16, "RATIO": 1.5, "MARGIN": 0.1}
        return rules | ({"turns": None} if call.how == PLAIN else {})
    config, types = call.config, {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    divisible = call.how == PLAIN
    meta = Meta(
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        DIVISIBLE_H=divisible,
        DIVISIBLE_TEACHER_H=divisible,
        DIVISIBLE_V=divisible,
        OPERAND=types[call.mix.operand],
        TEACHER_OPERAND=types[call.mix.of("teacher_operand")],
        PRECISION=call.mix.precision,
        SHARED=not call.own,
        STACKED=config.stacked and not call.own and call.kernel != "chosen_logits",
        FLATTEN=config.flatten,
        GUARDED=config.guarded,
    )
    kind = {OPTIONS: "jsd", OTHER: "forward_kl"}.get(call.how, "reverse_kl")
    absent = {UNEVEN: ABSENT, PLAIN: ABSENT + BESIDE}.get(call.how, ())
    return {"META": meta, "JSD": call.how != OTHER, "KIND": kind} | dict.fromkeys(absent)


def known_divisible(fn: Any, types: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    """The positions of arguments that are known at compile time to be divisible by 16."""
    for param in fn.params:
        given = types[param.name]
        leaves = {(param.num, i): x for i, x in enumerate(given)} if isinstance(given, tuple) else {(param.num,): given}
        yield from (at for at, x in leaves.items() if not param.do_not_specialize and x not in ("constexpr", "fp32"))


def source_of(call: Call) -> tuple[Any, dict[str, int]]:
    """(the source that Triton compiles for a call, the options)"""
    from triton.compiler import ASTSource

    from sgcd_kernels.backends.triton import launch

    fn, config = kernels()[call.kernel], call.config
    if call.unaligned:
        fn = launch.without_alignment(fn)
    types, constants = arguments_of(call, fn)
    attrs = {at: [["tt.divisibility", 16]] for at in known_divisible(fn, types)}
    return ASTSource(fn, types, constants, attrs), launch.options(config) if config else {"num_warps": 1}


def compile_case(call: Call) -> Row:
    """Compile a call."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = source_of(call)
    compiled = triton.compile(source, target=GPUTarget("cuda", call.arch, 32), options=options)
    usage, ptx = resource_usage(compiled.asm["cubin"]), compiled.asm["ptx"]
    return Row(
        call, usage["REG"], compiled.metadata.shared, usage["STACK"], usage["LOCAL"] + local_bytes(ptx),
        ptx.count(MATRIX[call.arch]), getattr(compiled.metadata, "tmem_size", None) or 0,
    )  # fmt: skip


def local_bytes(ptx: str) -> int:
    """Bytes of local arrays from the front end; spills of the assembler are counted in the stack."""
    return sum(int(size) for size in re.findall(r"\.local .*?\[(\d+)\]", ptx))


def resource_usage(cubin: bytes) -> dict[str, int]:
    """cuobjdump's report of the only kernel in a binary."""
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
    parser.add_argument("--plain", action="store_true", help="only the plain call of each configuration that runs")
    args = parser.parse_args()
    print(HEADER)
    print("|---|---|---|---|---|---|---|---|---|")
    failed = 0
    for call in cases(args.kernel, args.arch):
        if args.plain and not call.plain:
            continue
        try:
            row = compile_case(call)
            faults = row.faults()
            print(row.line() + "".join(f" {fault}" for fault in faults), flush=True)
        except Exception as error:  # a case that does not compile is a row too, and sets the exit code
            faults = [str(error)]
            print(f"| {call.kernel} | {call.mix} | sm_{call.arch} | {call.config} | {type(error).__name__}: {error} |")
        failed |= bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
