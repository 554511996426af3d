"""Rows survive the disk, the newest count, and stale tables are noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import cpp_table, rows, tables, training_rows
from bench.rows import Row

BASE = Row(
    op="divergence",
    mode="forward",
    shape="smollm2",
    N=256,
    kept=176,
    H=576,
    V=49_152,
    dtype="fp32",
    device="a machine",
    torch="2.13.0",
    sha="abc1234",
    date="2026-01-02T03:04:05Z",
    threads=2,
)


def row(provider: str, ms: float | None, **more: object) -> Row:
    return replace(BASE, provider=provider, median_ms=ms, p20_ms=ms, p80_ms=ms, samples=3, **more)  # type: ignore[arg-type]


ROWS = [
    row("cpp", 10.0, floor_ratio=1.25, peak_mb=2.0, error=3e-7),
    row("torch", 12.0, floor_ratio=1.5),
    row("gemm", 8.0, floor_ratio=1.0),
    row("eager", 50.0, peak_mb=300.0, floor_ratio=6.25),
    row("trl", 20.0, floor_ratio=2.5),
    row("liger", None, status="needs a GPU"),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    rows.append(rows.path_of(ROWS[0], folder), ROWS)
    return folder


def test_rows_survive_the_disk(results: Path) -> None:
    assert [p.name for p in results.iterdir()] == ["divergence_a-machine_2026-01-02_abc1234.csv"]
    back = rows.read(results)
    assert back == ROWS
    assert back[0].error == 3e-7 and back[5].median_ms is None


def test_the_newest_row_counts_and_foreign_files_do_not(results: Path) -> None:
    later = replace(ROWS[0], median_ms=5.0, date="2026-01-03T00:00:00Z", sha="def5678")
    rows.append(rows.path_of(later, results), [later])
    (results / "cpu_kernels_old.csv").write_text("op,dtype\nscore,bf16\n", encoding="utf-8")
    found = {r.provider: r for r in rows.read(results)}
    assert found["cpp"].median_ms == 5.0 and found["torch"].median_ms == 12.0 and len(found) == len(ROWS)


def test_the_summary_names_the_fastest_on_either_side(results: Path) -> None:
    text = tables.summary(results)
    line = next(x for x in text.splitlines() if x.startswith("| divergence"))
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells == [
        "divergence forward",
        "smollm2 fp32, 256",
        "10.0 (cpp)",
        "1.25",
        "5.00 x",
        "2.00 x (trl)",
        "2.00 / 300",
    ]


def test_the_summary_is_of_the_newest_processor_and_the_newest_gpu(results: Path) -> None:
    newer = [row("cpp", 9.0, device="a newer machine", date="2026-01-05T00:00:00Z")]
    gpu = [row("triton", 1.0, device="a GPU", threads=0, date="2026-01-01T00:00:00Z")]
    for found in (newer, gpu):
        rows.append(rows.path_of(found[0], results), found)
    text = tables.summary(results)
    assert text.index("**a GPU**") < text.index("**a newer machine**") and "**a machine**" not in text
    assert "### a machine" in tables.full(results), "of which the full table has every row"


def test_the_table_of_the_cpu_kernels(results: Path) -> None:
    more = [
        row("walk", 8.0),
        row("eager-all", 80.0, peak_mb=400.0, error=2e-5),
        row("compile", 15.0),
        row("liger-chunked", None, status="out of memory"),
    ]
    rows.append(rows.path_of(more[0], results), more)
    line = next(x for x in cpp_table.table(results).splitlines() if x.startswith("| score"))
    assert [c.strip() for c in line.strip("|").split("|")] == [
        "score, fp32",
        "256, 576, 49,152",
        "10.0",
        "1.25",
        "1.25",
        "8.00 x",
        "1.50 x",
        "out of memory",
        "3e-07 / 2e-05",
        "2 / 400",
    ]


def test_the_full_table_keeps_losers_and_reasons(results: Path) -> None:
    lines = tables.full(results).splitlines()
    order = [x.split("|")[1].strip() for x in lines if x.startswith("| ") and "provider" not in x]
    assert order == ["gemm", "cpp", "torch", "trl", "eager", "liger"]
    assert any(x.startswith("| liger | needs a GPU |") for x in lines)


def test_times_beside_other_programs_are_marked(results: Path) -> None:
    assert "~" not in tables.full(results)
    busy = row("cpp", 11.0, others=0.8)
    busy.date = "2026-01-04T00:00:00Z"
    rows.append(rows.path_of(busy, results), [busy])
    assert "11.0~" in tables.full(results) and "read ratios" in tables.full(results)


def documents(root: Path) -> None:
    (root / "docs").mkdir()
    (root / "README.md").write_text("a\n<!-- bench:summary -->\nold\n<!-- /bench -->\nz\n", encoding="utf-8")
    text = "<!-- bench:full -->\n<!-- /bench -->\n<!-- bench:training -->\n<!-- /bench -->\n"
    (root / "docs" / "benchmarks.md").write_text(text, encoding="utf-8")
    (root / "docs" / "kernels.md").write_text("<!-- bench:cpp -->\n<!-- /bench -->\n", encoding="utf-8")


def test_stale_tables_are_noticed_and_made_fresh(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents(tmp_path)
    assert tables.main(check=True, root=tmp_path, results=results) == 1
    assert "README.md" in capsys.readouterr().err
    assert "old" in (tmp_path / "README.md").read_text(), "a check changes nothing"
    assert tables.main(check=False, root=tmp_path, results=results) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("a\n") and text.endswith("z\n") and "| divergence forward |" in text and "old" not in text
    assert tables.main(check=True, root=tmp_path, results=results) == 0
    rows.append(rows.path_of(ROWS[0], results), [replace(ROWS[0], median_ms=9.0, date="2026-02-01T00:00:00Z")])
    assert tables.main(check=True, root=tmp_path, results=results) == 1


def test_an_unknown_table_is_refused(results: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown table 'nothing'; there are summary"):
        tables.filled("<!-- bench:nothing -->\n<!-- /bench -->", results)


def test_training_rows(tmp_path: Path) -> None:
    first = training_rows.TrainingRow(
        task="workday",
        provider="ours-sgcd",
        seconds_per_step="2.00",
        rollout_share="0.600",
        device="m",
        date="2026-01-01",
    )
    failed = replace(first, provider="trl-grpo", status="needs the package trl")
    newer = replace(first, seconds_per_step="1.00", sgcd_overhead="0.250", date="2026-01-02")
    for r in (first, failed, newer):
        training_rows.append(training_rows.path_of(r, tmp_path), r)
    text = training_rows.table(tmp_path)
    assert "| workday | ours-sgcd | 1.00 |" in text and "25%" in text and "60%" in text and "2.00" not in text
    assert "| workday | trl-grpo | needs the package trl |" in text
    assert rows.read(tmp_path) == [], "rows of another kind"
