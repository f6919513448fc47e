"""Images that could not be read, and images that were rejected: what becomes of them, without a run."""

import csv
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.artifacts.output import Output
from captioner.artifacts.tables import CAPTIONED_ROWS
from captioner.errors import OutOfReachError, SourceError
from captioner.features.rejects import REJECTS, report_rejects
from captioner.features.row_marks import CHECKPOINT, finish_rows
from captioner.features.unreadable import (
    UNREADABLE,
    discard_unreadable,
    set_aside,
    settle_unreadable,
)
from captioner.sources.tasks import source_rows

TOTAL = 6


def loaded(*kinds: str | None) -> pa.Table:
    """Rows ``0``, ``1`` ... with an error of each kind, or none."""
    names = [str(number) for number in range(len(kinds))]
    errors = [kind and f"{kind} fault" for kind in kinds]
    uris = [f"s3://b/{name}" for name in names]
    return source_rows(names, uris, [None] * len(names), errors, kinds, sizes=[1] * len(names))


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(str(tmp_path / "out"), {"job": "test"})


def finish_file(output: Output, rows: pa.Table) -> None:
    """Write rows as a run does, and their mark."""
    for name in CAPTIONED_ROWS.names:
        if name not in rows.column_names:
            kind = CAPTIONED_ROWS.field(name)
            rows = rows.append_column(kind, pa.nulls(len(rows), kind.type))
    for place in (output.uri("captions"), output.work(CHECKPOINT)):
        Path(place).mkdir(parents=True, exist_ok=True)
        pq.write_table(rows.select(CAPTIONED_ROWS.names), f"{place}/part-{len(rows)}.parquet")


@pytest.fixture
def half_read(output: Output) -> Output:
    """A run of six images, of which one is rejected and two could not be read; a task that was repeated read one."""
    folder = output.work(UNREADABLE)
    rows = loaded(None, "final", "retryable", None, "retryable", None)
    kept = set_aside(rows, folder, 0.0)
    assert kept["image_id"].to_pylist() == ["0", "1", "3", "5"]
    assert set_aside(kept, folder, 0.0) is kept
    set_aside(rows, folder, 0.0)
    finish_file(output, kept)
    late = rows.slice(4, 1).set_column(5, "error", pa.nulls(1, pa.string()))
    finish_file(output, late.set_column(6, "error_kind", pa.nulls(1, pa.string())))
    return output


def settle(output: Output, *, accept: bool) -> None:
    settle_unreadable(output, "captions", CAPTIONED_ROWS, TOTAL, accept=accept)


def test_what_could_not_be_read_is_counted_once_and_left(half_read: Output) -> None:
    with pytest.raises(
        OutOfReachError, match=r"^1 of 6 images could not be read, 2 first: retryable fault"
    ):
        settle(half_read, accept=False)
    assert sorted(path.name for path in Path(half_read.uri("captions")).iterdir()) == [
        "part-1.parquet",
        "part-4.parquet",
    ]


def test_where_it_is_accepted_it_has_a_row_until_the_next_try(half_read: Output) -> None:
    settle(half_read, accept=True)
    rows = finish_rows(half_read, "captions", TOTAL)
    found = {row["image_id"]: row for row in rows.failed.to_pylist()}
    assert {name: row["error_kind"] for name, row in found.items()} == {
        "1": "final",
        "2": "retryable",
    }
    assert found["2"]["uri"] == "s3://b/2"
    assert len(rows.good) == 4
    # A run that was killed here and is continued.
    discard_unreadable(half_read, "captions")
    settle(half_read, accept=False)
    assert len(list(Path(half_read.uri("captions")).iterdir())) == 2


def failed_rows(count: int) -> pa.Table:
    names = [f'{number} "é",\n=x' for number in range(count)]
    reasons = ["damaged" if number else "not an image" for number in range(count)]
    columns = {"image_id": names, "uri": names, "error": reasons, "error_kind": ["final"] * count}
    return pa.table(columns)


def test_rejects_are_a_table_that_people_open(
    output: Output, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    failed = failed_rows(3)
    (entry,) = report_rejects(output, failed, 6, 0.5)
    assert entry.path == REJECTS
    data = Path(output.uri(REJECTS)).read_bytes()
    assert entry.bytes == len(data)
    with io.StringIO(data.decode(), newline="") as text:
        assert list(csv.DictReader(text)) == failed.to_pylist()
    assert [" ".join(record.message.split()[:3]) for record in caplog.records] == [
        "2 rejected: damaged",
        "1 rejected: not",
    ]
    # And none where there are none, whatever an earlier try had.
    assert report_rejects(output, failed_rows(0), 6, 0.5) == []
    assert not Path(output.uri(REJECTS)).exists()


def test_accepted_images_that_could_not_be_read_are_no_rejects(output: Output) -> None:
    failed = failed_rows(3).set_column(
        3, "error_kind", pa.array(["retryable", "retryable", "final"])
    )
    assert [entry.path for entry in report_rejects(output, failed, 6, 0.2)] == [REJECTS]
    with pytest.raises(SourceError, match=r"^1 of 6 images were rejected"):
        report_rejects(output, failed, 6, 0.1)
    # But a collection of nothing is nobody's wish.
    with pytest.raises(OutOfReachError, match=r"^none of 3 images .* 2 could not be read: "):
        report_rejects(output, failed, 3, 0.5)
    assert report_rejects(output, failed, 3, 1.0)


@pytest.mark.parametrize(("fraction", "most"), [(0.0, 0), (0.5, 3), (1.0, 6)])
def test_the_fraction_of_rejects_is_a_bound_that_is_allowed(
    output: Output, fraction: float, most: int
) -> None:
    report_rejects(output, failed_rows(most), 6, fraction)
    if most < 6:
        with pytest.raises(SourceError):
            report_rejects(output, failed_rows(most + 1), 6, fraction)


def test_too_many_rejects_are_a_failure_that_says_why_and_where(output: Output) -> None:
    with pytest.raises(
        SourceError, match=r"(?s)^4 of 6 images .* 0\.5: 3 rejected: damaged .*rejects\.csv"
    ):
        report_rejects(output, failed_rows(4), 6, 0.5)
    assert Path(output.uri(REJECTS)).exists()
