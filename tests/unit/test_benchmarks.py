"""Figures of benchmarks: what a row holds, and what becomes of rows that are there."""

import csv
import sys
from datetime import datetime
from pathlib import Path

import pytest

from benchmarks.measurement import append_rows
from ray_jobs import benchmark


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_rows_say_when_where_and_how_they_came_about(tmp_path: Path) -> None:
    file = tmp_path / "results" / "train.csv"
    rows = [{"workers": 1, "rate": 1 / 3}, {"workers": 2, "rate": 1234567.0}]
    append_rows(str(file), rows, "benchmark --workers 1 2")
    first, second = read(file)
    assert list(first) == [
        "date", "commit", "processor", "cores", "flags", "gpu", "torch", "ray", "command", "workers", "rate"
    ]  # fmt: skip
    assert datetime.fromisoformat(first["date"]).tzinfo
    assert all(first[name] for name in ("processor", "cores", "gpu", "torch", "ray"))
    assert first["command"] == "benchmark --workers 1 2"
    assert (first["workers"], first["rate"]) == ("1", "0.3333333")
    assert (second["workers"], second["rate"]) == ("2", "1234567")


def test_earlier_rows_stay_when_a_column_comes_or_goes(tmp_path: Path) -> None:
    file = tmp_path / "serve.csv"
    append_rows(str(file), [{"clients": 1, "note": "a, b\nc"}], "one")
    append_rows(str(file), [{"clients": 2, "gpus": 0}], "two")
    first, second = read(file)
    assert (first["clients"], first["note"], first["gpus"]) == ("1", "a, b\nc", "")
    assert (second["clients"], second["note"], second["gpus"]) == ("2", "", "0")


def test_without_a_checkout_the_job_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.programs", raising=False)
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "checkout" in error
    assert error.count("\n") == 1
