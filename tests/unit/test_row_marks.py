"""What a run finds of earlier ones and of one beside it: which files are whole, and which rows count."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner import storage
from captioner.artifacts.output import Output
from captioner.errors import OutOfReachError, StoreError
from captioner.features.row_marks import (
    CHECKPOINT,
    count_done,
    count_rows,
    discard_unfinished,
    finish_rows,
    finished,
    rewrite_repeated,
    write_removed,
)
from tests.s3 import Fault, S3Server

IDENTITY = {"job": "x"}


def write(
    output: Output, task: str, rows: dict[str, str | None], *, mark: str | None = ".parquet"
) -> None:
    """A file of a task of Ray Data's, ids with errors, and its mark."""
    table = pa.table(
        {
            "image_id": pa.array(list(rows), pa.string()),
            "uri": pa.array(list(rows), pa.string()),
            "error": pa.array(list(rows.values()), pa.string()),
            "error_kind": pa.array([error and "final" for error in rows.values()], pa.string()),
        }
    )
    places = [output.uri("features", f"{task}-0.parquet")]
    if mark is not None:
        places.append(output.work(CHECKPOINT, f"{task}{mark}"))
    for place, part in zip(places, (table, table.select(["image_id"])), strict=False):
        data = pa.BufferOutputStream()
        pq.write_table(part, data)
        storage.write_bytes(place, data.getvalue().to_pybytes())


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(str(tmp_path / "out"), IDENTITY)


def paths(output: Output) -> set[str]:
    listed = {file.path for file in storage.list_files(output.root)}
    return listed - {"_job.json", "_work/lease"}


def test_of_what_two_runs_wrote_every_image_counts_once(output: Output) -> None:
    write(output, "a_1", {"1": None, "2": "truncated", "3": None})
    write(output, "b_1", {"2": None, "3": None, "4": None})
    write(output, "b_2", {"1": "truncated", "5": "truncated"})
    rows = finish_rows(output, "features", 5)
    assert len(rows) == 5
    assert rows.failed["image_id"].to_pylist() == ["5"]
    assert rows.repeated == {
        "features/a_1-0.parquet": ["2"],
        "features/b_1-0.parquet": ["3"],
        "features/b_2-0.parquet": ["1"],
    }
    assert count_rows(rows, {}).found == 5
    removed = write_removed(output, rows)
    assert removed is not None
    assert removed.rows == 3
    with storage.open_input(removed.uri(output.root)) as file:
        assert pq.read_table(file).to_pylist() == [
            {"file": "features/a_1-0.parquet", "image_id": "2"},
            {"file": "features/b_1-0.parquet", "image_id": "3"},
            {"file": "features/b_2-0.parquet", "image_id": "1"},
        ]
    # Tables that other programs read are without them.
    for _ in range(2):  # as after a kill
        once = []
        for entry in rewrite_repeated(output, finish_rows(output, "features", 5)):
            with storage.open_input(entry.uri(output.root)) as file:
                once += pq.read_table(file).to_pylist()
        assert {row["image_id"]: row["error"] for row in once} == {
            **dict.fromkeys(("1", "2", "3", "4")),
            "5": "truncated",
        }
        assert len(once) == 5


def test_rows_of_one_run_need_no_repair(output: Output) -> None:
    write(output, "a_1", {"1": None, "2": "truncated"})
    write(output, "a_2", {"3": None})
    rows = finish_rows(output, "features", 3)
    assert rows.repeated == {}
    assert write_removed(output, rows) is None
    assert rewrite_repeated(output, rows) == rows.files
    assert [(entry.path, entry.rows) for entry in rows.files] == [
        ("features/a_1-0.parquet", 2),
        ("features/a_2-0.parquet", 1),
    ]


@pytest.mark.parametrize("damaged", ["features/b_1-0.parquet", f"_work/{CHECKPOINT}/b_1.parquet"])
@pytest.mark.parametrize("size", [None, 0, 20])
def test_what_a_power_cut_or_another_run_took_is_done_again(
    output: Output, damaged: str, size: int | None
) -> None:
    write(output, "a_1", {"1": None})
    write(output, "b_1", {"2": None, "3": None})
    place = output.uri(damaged)
    if size is None:
        storage.delete(place)
    else:
        storage.write_bytes(place, storage.read_bytes(place)[:size])
    if damaged.startswith("features"):
        with pytest.raises(OutOfReachError, match="the rows of 2 of 3 images are lost; the same"):
            finish_rows(output, "features", 3)
    discard_unfinished(output, "features")
    left = {"features/a_1-0.parquet", f"_work/{CHECKPOINT}/a_1.parquet"}
    if damaged.startswith("_work") and size is None:
        # Whole, and nobody's: its rows are written again, and count once.
        left.add("features/b_1-0.parquet")
    assert paths(output) == left
    assert count_done(output) == len(finished(output)) == 1
    write(output, "c_1", {"2": None, "3": None})
    assert len(finish_rows(output, "features", 3)) == 3


@pytest.mark.parametrize("place", ["features/b_1-0.parquet", f"_work/{CHECKPOINT}/b_1.parquet"])
def test_what_is_damaged_in_the_middle_says_the_way_out(output: Output, place: str) -> None:
    write(output, "a_1", {"1": None})
    write(output, "b_1", {str(number): None for number in range(2, 50)})
    data = storage.read_bytes(output.uri(place))
    storage.write_bytes(output.uri(place), data[:8] + bytes(24) + data[32:])
    discard_unfinished(output, "features")
    read = finished if place.startswith("_work") else lambda out: finish_rows(out, "features", 49)
    with pytest.raises(
        StoreError, match=rf"{place} is damaged: .*: delete it, and the same command"
    ) as one:
        read(output)
    assert "\n" not in str(one.value)
    storage.delete(output.uri(place))
    discard_unfinished(output, "features")
    assert len(finished(output)) == 1
    write(output, "c_1", {str(number): None for number in range(2, 50)})
    assert len(finish_rows(output, "features", 49)) == 49


def test_a_pending_file_goes_with_all_its_marks(output: Output) -> None:
    write(output, "a_1", {"1": None})
    write(output, "b_1", {"2": None}, mark=".pending.parquet")
    write(output, "b_1", {"2": None})
    write(output, "b_10", {"3": None})
    discard_unfinished(output, "features")
    assert {path.split("/")[-1] for path in paths(output)} == {
        *("a_1-0.parquet", "a_1.parquet", "b_10-0.parquet", "b_10.parquet")
    }


def test_a_file_that_is_not_whole_does_not_count(output: Output) -> None:
    write(output, "a_1", {"1": None})
    storage.write_bytes(output.uri("features/b_1-0.parquet"), b"PAR1 half")
    storage.write_bytes(output.uri("features/part.parquet.4711.partial"), b"PAR1 half")
    assert [entry.path for entry in finish_rows(output, "features", 1).files] == [
        "features/a_1-0.parquet"
    ]


def test_an_image_twice_in_one_file_is_refused(output: Output) -> None:
    write(output, "a_1", {"1": None})
    table = pa.concat_tables([pq.read_table(output.uri("features/a_1-0.parquet"))] * 2)
    pq.write_table(table, output.uri("features/a_1-0.parquet"))
    with pytest.raises(StoreError, match="holds 1 twice"):
        finish_rows(output, "features", 1)


def test_a_store_that_refuses_to_say_loses_nothing(bucket: str, s3_server: S3Server) -> None:
    with Output(f"{bucket}/refusing", IDENTITY) as output:
        write(output, "a_1", {"1": None})
        for fault, error in (
            (Fault(403, "AccessDenied", "GET HEAD", "a_1"), StoreError),
            (Fault(503, "SlowDown", "GET HEAD", "a_1"), OutOfReachError),
        ):
            with s3_server.failing(fault), pytest.raises(error):
                discard_unfinished(output, "features")
        discard_unfinished(output, "features")
        assert len(finished(output)) == 1
