"""Import cost, the names of `__all__`, and the status of the backends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import sgcd_kernels

ROOT = Path(__file__).resolve().parents[2]


def test_import_is_light() -> None:
    code = (
        "import sys, sgcd_kernels, torch\n"
        "heavy = {'transformers', 'triton', 'trainer', 'pydantic', 'peft'} & {m.split('.')[0] for m in sys.modules}\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'sgcd_kernels.reference' not in sys.modules\n"
    )
    # Whatever torch itself imports is not ours to count, so it must be absent from torch too.
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_public_names() -> None:
    for name in sgcd_kernels.__all__:
        assert getattr(sgcd_kernels, name).__doc__, name
    assert (Path(sgcd_kernels.__file__).parent / "py.typed").exists()


def test_backend_status_explains_itself() -> None:
    status = sgcd_kernels.backend_status()
    assert set(status) == {"torch", "cpp", "triton"}
    assert status["torch"].usable
    assert all(s.usable or len(s.reason) > 10 for s in status.values())
