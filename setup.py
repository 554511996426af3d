"""Packaging is declared in pyproject.toml; this file builds the optional C++ extension, or says why it did not.

SGCD_BUILD=0 leaves it out, SGCD_BUILD=1 makes a failure fatal; otherwise a package without it is built, and
`sgcd_kernels.backend_status()` repeats the reason. torch is not a build requirement: pip would fetch gigabytes of CUDA
into an isolated build. So `pip install --no-build-isolation .` builds the extension, and a plain `pip install .` gives
the pure-Python package.

SGCD_WERROR=1 makes the compiler's warnings errors; .ci/run sets it. Without it, a new warning of another
compiler fails nobody's install. SGCD_BUILD_BENCH=1 adds `matmul_sweep`, an operator that only the benchmark calls.
"""

import importlib.util
import json
import os
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CHOICE = os.environ.get("SGCD_BUILD", "")
# -ffp-contract=off: what is rounded, and when, must not depend on the compiler's taste. No -march: one binary, chosen
# among its own paths at run time.
FLAGS = ["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-DNDEBUG"]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow"]
if os.environ.get("SGCD_WERROR") == "1":
    WARNINGS.append("-Werror")
LEFT_OUT = () if os.environ.get("SGCD_BUILD_BENCH") == "1" else ("matmul_sweep.cpp",)
digest = runpy.run_path("sgcd_kernels/backends/cpp/sources.py")["digest"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


def reason_to_skip() -> "str | None":
    if CHOICE not in ("", "0", "1"):
        raise SystemExit(f"SGCD_BUILD is {CHOICE!r}, needs 0 or 1 (or nothing)")
    if CHOICE == "0":
        return "SGCD_BUILD=0"
    if sys.platform not in ("linux", "darwin"):
        return f"it is not built on {sys.platform}"
    if importlib.util.find_spec("torch") is None:
        return "torch was not in the build environment (pip isolates builds)"
    compiler = os.environ.get("CXX", "c++ g++ clang++")
    if not any(shutil.which(name) for name in compiler.split()):
        return f"no C++ compiler was found (looked for {compiler})"
    return None


def write_note(folder: Path, **note: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.json").write_text(json.dumps(note) + "\n", encoding="utf-8")


class BuildExtension(build_ext):
    """Compile against the torch that is here; without SGCD_BUILD=1 a failure costs the extension, not the install."""

    def run(self) -> None:
        folder = Path(self.get_ext_fullpath("sgcd_kernels.backends.cpp._C")).parent
        try:
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths

            for extension in self.extensions:
                # As system headers, whose warnings are not ours.
                extension.extra_compile_args += [f"-isystem{path}" for path in include_paths()]
                extension.library_dirs += library_paths()
                abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
                extension.define_macros += [("_GLIBCXX_USE_CXX11_ABI", str(abi))]
            super().run()
            write_note(folder, torch=torch.__version__, sources=digest(Path("csrc")))
        except Exception as error:
            if CHOICE == "1":
                raise
            first = str(error).strip().splitlines() or [type(error).__name__]
            print(f"sgcd-kernels: going on without the C++ extension: {first[0]}", file=sys.stderr)
            write_note(folder, reason=f"compiling failed ({first[0][:200]}); SGCD_BUILD=1 shows all of it")

    def build_extensions(self) -> None:
        """Compile the files side by side, MAX_JOBS at one time: setuptools would take one after the other."""
        compile_all = self.compiler.compile
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))

        def compile_each(sources, *args, **options):  # type: ignore[no-untyped-def]
            with ThreadPoolExecutor(jobs) as pool:
                return [made for one in pool.map(lambda s: compile_all([s], *args, **options), sources) for made in one]

        self.compiler.mkpath(str(Path(self.build_temp, "csrc")))
        self.compiler.compile = compile_each
        super().build_extensions()

    def copy_extensions_to_source(self) -> None:
        built = [Path(self.build_lib, self.get_ext_filename(e.name)) for e in self.extensions]
        if all(path.exists() for path in built):  # not where compiling failed
            super().copy_extensions_to_source()


class BuildPython(build_py):
    """Leave the note where nothing is compiled."""

    def run(self) -> None:
        super().run()
        if skip is not None:
            root = Path() if getattr(self, "editable_mode", False) else Path(self.build_lib)
            write_note(root / "sgcd_kernels" / "backends" / "cpp", reason=skip)


skip = reason_to_skip()
if skip is not None and CHOICE == "1":
    raise SystemExit(f"SGCD_BUILD=1, but {skip}")
extension = Extension(
    "sgcd_kernels.backends.cpp._C",
    sources=sorted(str(path) for path in Path("csrc").glob("*.cpp") if path.name not in LEFT_OUT),
    depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    extra_compile_args=FLAGS + WARNINGS + OPENMP,
    extra_link_args=OPENMP,
    libraries=["torch_cpu", "torch", "c10"],
    language="c++",
)
setup(
    ext_modules=[] if skip is not None else [extension],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
