"""A picture of each kind from rows, the same file from the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench import plots, rows
from tests.bench.test_tables import ROWS


def test_pictures(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for n in (128, 256):
        rows.append(rows.path_of(ROWS[0], results), [replace(r, N=n) for r in ROWS])
    assert plots.main(results, tmp_path / "a") == 0
    stem = "divergence-forward_smollm2_fp32_a-machine"
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {f"{stem}_{kind}.{end}" for kind in ("speed", "memory", "floor") for end in ("png", "svg")}
    assert (tmp_path / "a" / f"{stem}_speed.png").read_bytes().startswith(b"\x89PNG")
    assert plots.main(results, tmp_path / "b") == 0
    for path in (tmp_path / "a").glob("*.svg"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        text = path.read_text()
        assert "liger" not in text, "what did not run is not drawn"
