"""A picture of each kind from rows, the same file from the same rows; and the front page's figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import figures, results
from bench.cases import UserError
from bench.results import Row
from tests.bench.test_report import ROWS


def test_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for n in (128, 256):
        results.append([replace(r, N=n) for r in ROWS], folder)
    assert figures.plot_all(folder, tmp_path / "a") == 0
    stem = "divergence-forward_smollm2_fp32_a-machine"
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {f"{stem}_{kind}.{end}" for kind in ("speed", "memory", "matmul") for end in ("png", "svg")}
    assert (tmp_path / "a" / f"{stem}_speed.png").read_bytes().startswith(b"\x89PNG")
    assert figures.plot_all(folder, tmp_path / "b") == 0
    for path in (tmp_path / "a").glob("*.svg"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        text = path.read_text()
        assert "liger" not in text, "what did not run is not drawn"


def front(provider: str, n: int, ms: float | None, mb: float | None, **more: object) -> Row:
    found = replace(ROWS[0], op="policy_loss", mode="full", provider=provider, N=n, median_ms=ms, peak_mb=mb)
    return replace(found, **more)  # type: ignore[arg-type]


def test_the_front_page_shows_the_device_with_most_numbers_of_tokens(tmp_path: Path) -> None:
    names = ("cpp", "eager", "compile", "liger-chunked")
    rows = [front(name, n, 10.0 * n, 2.0 * n) for name in names for n in (128, 256, 512)]
    rows += [front("liger-chunked", 1024, None, None, status="gave up after 120 s")]
    rows += [front("torch", 512, 1.0, 1.0), front("matmul", 512, 1.0, None)]
    newer = [front(name, n, 1.0, 1.0, device="z", date="2026-02-01T00:00:00Z") for name in names for n in (128, 256)]
    shown = figures._front_rows([*rows, *newer])
    assert {r.device for r in shown} == {"a machine"} and {r.provider for r in shown} == set(names)
    series = figures._series(shown)
    assert {name: list(found) for name, found in series.items()} == {
        "PyTorch": [128, 256, 512],
        "Liger": [128, 256, 512, 1024],
        "torch.compile": [128, 256, 512],
        "sgcd-kernels": [128, 256, 512],
    }
    for r in rows:
        results.append([r], tmp_path / "results")
    out = tmp_path / "figures" / "front.png"
    assert figures.draw_front_page(tmp_path / "results", out) == 0
    first = out.read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) < 150_000
    assert int.from_bytes(first[16:20], "big") == 1200, "pixels wide"
    figures.draw_front_page(tmp_path / "results", out)
    assert out.read_bytes() == first, "the same rows give the same file"


def test_the_fastest_of_our_backends_is_drawn() -> None:
    rows = [front("cpp", 128, 20.0, 5.0), front("triton", 128, 10.0, 6.0), front("triton", 256, None, 7.0)]
    ours = figures._series(rows)["sgcd-kernels"]
    assert [(n, r.provider) for n, r in ours.items()] == [(128, "triton"), (256, "triton")]


def test_one_number_of_tokens_is_no_figure() -> None:
    with pytest.raises(UserError, match="two numbers of tokens"):
        figures._front_rows([front("cpp", 128, 1.0, 1.0), front("cpp", 256, None, 1.0)])
