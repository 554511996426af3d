"""What is installed: the source distribution builds by itself, with the extension or without, and says which it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc", "sgcd_kernels", "trainer", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
SAYS = "import sgcd_kernels as s; print(s.__file__); print(s.backend_status()['cpp'].reason)"
USES = """
import sgcd_kernels as s, torch
x, w = torch.eye(2, 4), torch.zeros(8, 4)
print(s.linear_logprob(x, w, torch.tensor([3, 0]), impl="cpp").logp.exp())
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SGCD_BUILD", "CXX")}
    made = [str(part) for part in command]
    return subprocess.run(made, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a copy, so that nothing that was built in the checkout can help."""
    folder = tmp_path_factory.mktemp("sources")
    for name in (*SOURCES, "constraints.txt"):
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "build.json", "__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder / name)
    made = run(sys.executable, "setup.py", "-q", "sdist", "-d", "dist", cwd=folder)
    assert made.returncode == 0, made.stderr[-2000:]
    (found,) = (folder / "dist").glob("*.tar.gz")
    return found


def wheel(sdist: Path, folder: Path, *options: str, **environment: str) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder)
    made = run(*pip, *options, sdist, cwd=folder, **environment)
    assert made.returncode == 0, made.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


def installed(wheel: Path, program: str) -> str:
    """What a program says that finds the package nowhere else but where the wheel was unpacked."""
    there = wheel.parent / "installed"
    zipfile.ZipFile(wheel).extractall(there)
    done = run(sys.executable, "-c", program, cwd=there, PYTHONPATH=str(there))
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_source_distribution_holds_what_a_build_reads(sdist: Path) -> None:
    with tarfile.open(sdist) as packed:
        names = {name.split("/", 1)[-1] for name in packed.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()} | set(SOURCES[3:])
    assert wanted <= names and "sgcd_kernels/py.typed" in names
    assert not [name for name in names if name.endswith(".so") or name == "sgcd_kernels/backends/cpp/build.json"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"SGCD_BUILD": "0"}, "SGCD_BUILD=0"), ({"CXX": "no-such-compiler"}, "no C++ compiler was found")],
)
def test_without_the_extension_it_says_why(
    sdist: Path, tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    found = wheel(sdist, tmp_path, **environment)
    assert found.name.endswith("-py3-none-any.whl"), "nothing of a machine is in it"
    where, says = installed(found, SAYS).splitlines()
    assert where.startswith(str(tmp_path)) and reason in says
    assert {name.split("/")[0] for name in zipfile.ZipFile(found).namelist() if ".dist-info/" not in name} == {
        "sgcd_kernels"
    }, "a wheel holds the library alone: other packages are called trainer, too"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SGCD_BUILD": "2"}, "SGCD_BUILD is '2', needs 0 or 1"),
        ({"SGCD_BUILD": "1", "CXX": "no-such-compiler"}, "SGCD_BUILD=1, but no C++ compiler was found"),
    ],
)
def test_what_cannot_be_built_as_asked_is_refused(
    sdist: Path, tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    with tarfile.open(sdist) as packed:
        packed.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    done = run(sys.executable, "setup.py", "-q", "build", cwd=folder, **environment)
    assert done.returncode != 0 and reason in done.stderr


@pytest.mark.slow
def test_with_the_extension_it_computes(sdist: Path, tmp_path: Path) -> None:
    found = wheel(sdist, tmp_path, SGCD_BUILD="1")
    assert "none-any" not in found.name
    assert "0.1250, 0.1250" in installed(found, USES)


@pytest.mark.slow
def test_an_isolated_build_needs_no_torch(sdist: Path, tmp_path: Path) -> None:
    """As `pip install .` builds: in an environment that pip makes, for which it needs a package index."""
    done = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, sdist, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = tmp_path.glob("*.whl")
    assert "torch was not in the build environment" in installed(found, SAYS)
