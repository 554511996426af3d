"""Rows survive the disk, the newest count, and files that were committed under earlier names are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import results
from bench.results import TrainingRow
from tests.bench.test_report import ROWS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results.append(ROWS, tmp_path)
    return tmp_path


def test_rows_survive_the_disk(folder: Path) -> None:
    assert [p.name for p in folder.iterdir()] == ["divergence_a-machine_2026-01-02_abc1234.csv"]
    back = results.read(folder)
    assert back == ROWS
    assert back[0].error == 3e-7 and back[5].median_ms is None


def test_the_newest_row_counts_and_foreign_files_do_not(folder: Path) -> None:
    later = replace(ROWS[0], median_ms=5.0, date="2026-01-03T00:00:00Z", sha="def5678")
    results.append([later], folder)
    (folder / "cpu_kernels_old.csv").write_text("op,dtype\nscore,bf16\n", encoding="utf-8")
    (folder / "empty.csv").touch()
    found = {r.provider: r for r in results.read(folder)}
    assert found["cpp"].median_ms == 5.0 and found["torch"].median_ms == 12.0 and len(found) == len(ROWS)


def test_earlier_names_of_columns_and_providers_are_read(folder: Path) -> None:
    (path,) = folder.iterdir()
    text = path.read_text(encoding="utf-8")
    assert "matmul_ratio" in text and ",matmul," in text
    path.write_text(text.replace("matmul_ratio", "floor_ratio").replace(",matmul,", ",gemm,"), encoding="utf-8")
    assert results.read(folder) == ROWS


def test_every_committed_result_is_read() -> None:
    older = {"cpu_kernels_2026-11-23_bce0174.csv", "cpu_kernels_2026-11-23_c3622e1.csv"}  # another suite's columns
    for path in results.RESULTS.glob("*.csv"):
        kind = TrainingRow if path.name.startswith("train_") else results.Row
        lines = len(path.read_text(encoding="utf-8").splitlines()) - 1
        assert len(list(results._read_file(path, kind))) == (0 if path.name in older else lines), path.name


def test_training_rows_survive_the_disk_beside_the_others(folder: Path) -> None:
    row = TrainingRow(
        task="workday", provider="ours-sgcd", steps=3, seconds_per_step=2.0, rollout_share=0.625, device="m",
        date="2026-01-01", sha="abc1234", threads=2, others=0.25,
    )  # fmt: skip
    results.append([row], folder)
    assert (folder / "train_m_2026-01-01_abc1234.csv").is_file()
    assert results.read_training(folder) == [row] and results.read(folder) == ROWS
