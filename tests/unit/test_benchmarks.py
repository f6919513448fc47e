"""Figures of benchmarks: what a row holds, and what becomes of rows that are there."""

import csv
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.gpu_report import Figure, GpuReport
from benchmarks.measurement import append_rows
from benchmarks.pictures import write_pictures
from benchmarks.watch import GpuUtilisation
from captioner.sources import open_source
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


def test_how_busy_gpus_are_is_asked_of_their_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "nvidia-smi"
    # Two GPUs, of which one does not tell.
    said.write_text("#!/bin/sh\nwhile :; do echo 80; echo '[N/A]'; sleep .01; echo 60; done\n")
    said.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    started = time.perf_counter()
    with GpuUtilisation() as found:
        while len(found._samples) < 20:
            time.sleep(0.01)
    middle = time.perf_counter()
    assert found.mean(started, middle) == pytest.approx(0.7, abs=0.02)
    assert found.mean(middle, middle + 1) is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with GpuUtilisation() as without:
        pass
    assert without.mean(0.0, time.perf_counter()) is None


def test_generated_pictures_are_as_large_as_imagenets_and_have_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 6, captions=3)
    files = sorted((tmp_path / "pictures").glob("*.jpg"))
    sizes = [file.stat().st_size for file in files]
    assert len({file.read_bytes() for file in files}) == 6
    assert 90_000 < sum(sizes) / 6 < 130_000
    for file in files:
        with Image.open(file) as picture:
            assert (picture.format, picture.size) == ("JPEG", (500, 375))
    source = open_source(str(tmp_path / "pictures"))
    captions = [row["caption"] for batch in source.captions() for row in batch.to_pylist()]
    assert len(captions) == 18
    assert all(7 <= len(caption.split()) <= 15 for caption in captions)


def test_a_page_says_what_was_measured_on_what_and_what_of_it_means_nothing() -> None:
    figures = [
        Figure(part="limits", what="loading, all CPUs", value=1234.5, unit="images/s"),
        Figure(part="limits", what="model alone", value=0.5, unit="images/s"),
        Figure(part="training", what="1 decoder", value=10.0, unit="captions/s"),
    ]
    whole = GpuReport(smoke=False, cpus=16, gpus=1, figures=figures)
    page = whole.page()
    assert "in Ray 1 GPUs and 16 logical CPUs" in page
    assert "| loading, all CPUs | 1,234 | images/s |\n| model alone | 0.5 | images/s |\n\n" in page
    assert page.index("## Limits") < page.index("## Training")
    assert "mean nothing" not in page
    assert "No GPU was there" in whole.model_copy(update={"gpus": 0}).page()
    assert "mean nothing" in whole.model_copy(update={"smoke": True}).page()
    assert whole.rows()[0] == {"smoke": False, "cpus": 16, "gpus": 1} | figures[0].model_dump()
