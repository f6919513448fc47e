"""``verify`` finds what has happened to a published directory since."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.artifacts.manifests import FileEntry, ReportManifest
from captioner.artifacts.output import Output
from captioner.artifacts.verify import verify
from captioner.errors import StoreError
from ray_jobs import verify as job
from tests.models import write_model
from tests.stores import write_store

ROWS = 1000


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file with a digest, and a table whose pages have checksums."""
    output = Output(str(tmp_path / "report"), {"job": "test"})
    entry = output.write("scores.json", b'{"bleu_4": 0.2}')
    table = tmp_path / "report/table.parquet"
    numbers = np.random.default_rng(0).normal(size=ROWS)
    pq.write_table(pa.table({"x": numbers}), table, write_page_checksum=True, compression="none")
    rows = FileEntry(path="table.parquet", bytes=table.stat().st_size, rows=ROWS)
    output.publish(
        ReportManifest(model="m", features="f", split="test", images=1, files=[entry, rows])
    )
    return tmp_path / "report"


def status(monkeypatch: pytest.MonkeyPatch, uri: Path) -> object:
    monkeypatch.setattr("sys.argv", ["verify", str(uri)])
    try:
        job.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_sound_directory_is_said_to_be_sound_with_status_0(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, published) == 0
    assert capsys.readouterr().out == f"{published}: 2 files, 1,000 rows: sound\n"


def test_stores_and_models_are_checked_by_their_manifests(tmp_path: Path) -> None:
    store = verify(write_store(tmp_path / "store", {"train": 3, "validation": 2}, files=2))
    assert (store.problems, store.files) == ([], 5)
    assert store.rows == 7 + 17  # 5 pictures and 2 rejected ones, with 3 captions or one each
    model = verify(write_model(tmp_path / "model"))
    assert (model.problems, model.rows) == ([], 0)
    assert model.files > 3


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        ("scores.json", Path.unlink, "missing"),
        ("scores.json", lambda path: path.write_bytes(b"{}"), "2 bytes, not 15"),
        ("scores.json", lambda path: flip(path, 12), "its SHA-256 is not the manifest's"),
        ("table.parquet", Path.unlink, "missing"),
        ("table.parquet", lambda path: flip(path, 3000), "cannot be read: "),
        ("table.parquet", lambda path: flip(path, -9), "cannot be read: "),
    ],
)
def test_damage_is_one_line_a_file_and_status_1(
    published: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: Callable[[Path], None],
    problem: str,
) -> None:
    damage(published / file)
    assert status(monkeypatch, published) == 1
    found, summary = capsys.readouterr().out.splitlines()
    assert found.startswith(f"{published}/{file}: {problem}")
    assert summary.startswith(f"{published}: 2 files, ")
    assert summary.endswith(" rows: 1 damaged")


def test_a_file_that_cannot_even_be_looked_for_is_a_line(published: Path) -> None:
    manifest = published / "manifest.json"
    manifest.write_text(manifest.read_text().replace("scores.json", "s" * 300))
    (problem,) = verify(str(published)).problems
    assert problem.startswith(f"{published}/{'s' * 300}: cannot be read: ")


def test_a_store_has_a_row_for_each_picture_that_it_counts(tmp_path: Path) -> None:
    write_store(tmp_path, {"train": 3, "validation": 2}, files=2)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"ok":5', '"ok":6'))
    (problem,) = verify(str(tmp_path)).problems
    assert problem == f"{manifest}: 7 rows of features, but 8 pictures"


def test_removed_rows_of_a_store_are_no_pictures(tmp_path: Path) -> None:
    write_store(tmp_path, {"train": 3}, files=2)
    table = tmp_path / "removed.parquet"
    pq.write_table(pa.table({"file": ["features/0.parquet"], "image_id": ["train-0002"]}), table)
    entry = FileEntry(path=table.name, bytes=table.stat().st_size, rows=1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["removed"] = entry.model_dump()
    manifest["counts"]["ok"] = 2
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert verify(str(tmp_path)).problems == []


def test_every_damaged_file_is_named(published: Path) -> None:
    (published / "scores.json").unlink()
    flip(published / "table.parquet", 3000)
    assert len(verify(str(published)).problems) == 2


def test_a_table_of_other_rows_is_not_the_published_one(published: Path) -> None:
    manifest = published / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"rows": {ROWS}', f'"rows": {ROWS + 1}'))
    (problem,) = verify(str(published)).problems
    assert problem.endswith("table.parquet: 1,000 rows, not 1,001")


def test_what_was_not_published_is_refused_with_status_2(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (published / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match="not a published directory"):
        verify(str(published))
    (published / "manifest.json").unlink()
    for uri in (published, published.parent / "nothing"):
        assert status(monkeypatch, uri) == 2
        error = capsys.readouterr().err
        assert error == f"error: {uri} is not a published directory: it has no manifest.json\n"
