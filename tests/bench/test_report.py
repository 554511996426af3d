"""What the tables of the documents say, and that stale ones are noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import report, results
from bench.results import Row, TrainingRow

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
    row("cpp", 10.0, matmul_ratio=1.25, peak_mb=2.0, error=3e-7),
    row("torch", 12.0, matmul_ratio=1.5),
    row("matmul", 8.0, matmul_ratio=1.0),
    row("eager", 50.0, peak_mb=300.0, matmul_ratio=6.25),
    row("trl", 20.0, matmul_ratio=2.5),
    row("liger", None, status="needs a GPU"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "results"
    results.append(ROWS, path)
    return path


def test_the_case_table_names_the_fastest_on_either_side(folder: Path) -> None:
    text = report.case_table(folder)
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


def test_the_summary_is_of_the_newest_processor_and_the_newest_gpu(folder: Path) -> None:
    newer = [row("cpp", 9.0, device="a newer machine", date="2026-01-05T00:00:00Z")]
    gpu = [row("triton", 1.0, device="a GPU", threads=0, date="2026-01-01T00:00:00Z")]
    for found in (newer, gpu):
        results.append(found, folder)
    text = report.case_table(folder)
    assert text.index("**a GPU**") < text.index("**a newer machine**") and "**a machine**" not in text
    assert "### a machine" in report.full_table(folder), "of which the full table has every row"


def test_the_table_of_the_cpu_kernels(folder: Path) -> None:
    more = [
        row("sweep", 8.0),
        row("eager-all", 80.0, peak_mb=400.0, error=2e-5),
        row("compile", 15.0),
        row("liger-chunked", None, status="out of memory"),
    ]
    results.append(more, folder)
    line = next(x for x in report.cpp_table(folder).splitlines() if x.startswith("| score"))
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


def test_the_full_table_keeps_losers_and_reasons(folder: Path) -> None:
    lines = report.full_table(folder).splitlines()
    order = [x.split("|")[1].strip() for x in lines if x.startswith("| ") and "provider" not in x]
    assert order == ["matmul", "cpp", "torch", "trl", "eager", "liger"]
    assert any(x.startswith("| liger | needs a GPU |") for x in lines)


def test_times_beside_other_programs_are_marked(folder: Path) -> None:
    assert "~" not in report.full_table(folder)
    busy = row("cpp", 11.0, others=0.8)
    busy.date = "2026-01-04T00:00:00Z"
    results.append([busy], folder)
    assert "11.0~" in report.full_table(folder) and "read ratios" in report.full_table(folder)


def documents(root: Path) -> None:
    (root / "docs").mkdir()
    (root / "README.md").write_text("a\n<!-- bench:summary -->\nyesterday\n<!-- /bench -->\nz\n", encoding="utf-8")
    text = "<!-- bench:full -->\n<!-- /bench -->\n<!-- bench:training -->\n<!-- /bench -->\n"
    (root / "docs" / "benchmarks.md").write_text(text, encoding="utf-8")
    (root / "docs" / "kernels.md").write_text("<!-- bench:cpp -->\n<!-- /bench -->\n", encoding="utf-8")


def test_stale_tables_are_noticed_and_made_fresh(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents(tmp_path)
    assert report.write_tables(check=True, root=tmp_path, results=folder) == 1
    assert "README.md" in capsys.readouterr().err
    assert "yesterday" in (tmp_path / "README.md").read_text(), "a check changes nothing"
    assert report.write_tables(check=False, root=tmp_path, results=folder) == 0
    text = (tmp_path / "README.md").read_text()
    assert (
        text.startswith("a\n") and text.endswith("z\n") and "| divergence forward |" in text and "yesterday" not in text
    )
    assert report.write_tables(check=True, root=tmp_path, results=folder) == 0
    results.append([replace(ROWS[0], median_ms=9.0, date="2026-02-01T00:00:00Z")], folder)
    assert report.write_tables(check=True, root=tmp_path, results=folder) == 1


def test_an_unknown_table_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown table 'nothing'; there are summary"):
        report.fill_blocks("<!-- bench:nothing -->\n<!-- /bench -->", folder)


def test_the_training_table(tmp_path: Path) -> None:
    first = TrainingRow(
        task="workday",
        provider="ours-sgcd",
        seconds_per_step=2.0,
        rollout_tokens_per_s=1000.0,
        update_tokens_per_s=500.0,
        rollout_share=0.6,
        device="m",
        date="2026-01-01",
    )
    failed = replace(first, provider="trl-grpo", status="needs the package trl")
    newer = replace(first, seconds_per_step=1.0, sgcd_overhead=0.25, date="2026-01-02")
    for r in (first, failed, newer):
        results.append([r], tmp_path)
    text = report.training_table(tmp_path)
    assert "| workday | ours-sgcd | 1.00 | 1000 | 500 | 60%, -, -, -, - | 25% |" in text and "2.00" not in text
    assert "| workday | trl-grpo | needs the package trl |" in text
    assert results.read(tmp_path) == [], "rows of another kind"


def compare(op: str, mode: str, n: int, peer: float, **more: object) -> list[Row]:
    """A case in which ours takes 10 ms and another `peer` ms."""
    case = {"op": op, "mode": mode, "N": n, "kept": n, **more}
    return [row("cpp", 10.0, peak_mb=4.0, **case), row("eager", 30.0, peak_mb=2.0, **case), row("trl", peer, **case)]


def test_the_short_table_shows_the_largest_case_of_each_op_and_the_worst_loss(tmp_path: Path) -> None:
    cases = [
        *compare("sgcd", "full", 512, 20.0),
        *compare("sgcd", "full", 128, 50.0),
        *compare("policy_loss", "full", 4096, 20.0, dtype="fp32"),
        *compare("policy_loss", "full", 256, 15.0, dtype="bf16"),
        *compare("divergence", "forward", 1024, 9.0),
        *compare("cross_entropy", "full", 128, 5.0),
    ]
    for r in cases:
        results.append([r], tmp_path)
    text = report.short_table(tmp_path)
    lines = [[c.strip() for c in x.strip("|").split("|")] for x in text.splitlines() if x.startswith("| ")][1:]
    assert [cells[:2] for cells in lines] == [
        ["sgcd full", "smollm2 fp32, 512"],
        ["policy_loss full", "smollm2 bf16, 256"],
        ["divergence forward", "smollm2 fp32, 1,024"],
        ["cross_entropy full", "smollm2 fp32, 128"],
    ]
    assert lines[3][4:] == ["3.00 x", "**0.50 x** (trl)", "**4.00** / 2.00"]
    assert lines[2][5] == "**0.90 x** (trl)" and lines[0][5] == "2.00 x (trl)"
    assert "sgcd-kernels is the fastest in 4 of 6 cases" in text
    assert text.count("| sgcd full |") == 1 and report.case_table(tmp_path).count("| sgcd full |") == 2


def test_missing_results_are_reported() -> None:
    empty = Path("/nowhere")
    tables = (report.short_table, report.case_table, report.full_table, report.cpp_table, report.training_table)
    assert [table(empty) for table in tables] == ["No results yet."] * len(tables)
