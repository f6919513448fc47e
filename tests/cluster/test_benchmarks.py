"""Benchmarks that need a Ray: that they run, and what of them does not depend on the machine."""

import csv
from pathlib import Path

import pytest

from benchmarks.config import BenchmarkGpuConfig
from benchmarks.programs import measure

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(600)]


@pytest.mark.long
def test_the_gpu_report_runs_without_a_gpu(tmp_path: Path) -> None:
    page, table = tmp_path / "report.md", tmp_path / "report.csv"
    measure("gpu", BenchmarkGpuConfig(smoke=True, page=str(page), csv=str(table)))
    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(dict.fromkeys(row["part"] for row in rows)) == [
        "limits", "extraction", "training", "captioning", "service"
    ]  # fmt: skip
    assert all(float(row["value"]) >= 0 for row in rows)
    assert all(float(row["value"]) > 0 for row in rows if row["unit"].endswith("/s"))
    text = page.read_text()
    assert "The figures mean nothing" in text
    assert all(row["what"] in text for row in rows)
