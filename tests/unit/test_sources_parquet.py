"""Parquet files as a source: ids, splits, captions, limits, and what is refused."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import SourceConfig
from captioner.errors import SourceError
from captioner.sources import open_source
from captioner.sources.parquet_rows import BYTES_PER_TABLE, SLICES_PER_GROUP
from tests.sources import IMAGE, captions_of, picture, read_all, read_uri, write_parquet


def test_parquet_ids_count_the_rows_of_a_split_over_its_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", 250)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", 30)
    write_parquet(tmp_path / "data/val-00000-of-00001.parquet", 2)
    source = open_source(str(tmp_path))
    rows = read_all(source)
    assert [row["image_id"] for row in rows] == [
        *(f"train-{number:06d}" for number in range(280)),
        "validation-000000",
        "validation-000001",
    ]
    for number, name in ((0, "train-00000-of-00002.parquet/0"), (249, "train-00000-of-00002.parquet/249"),
                         (250, "train-00001-of-00002.parquet/0"), (281, "val-00000-of-00001.parquet/1")):  # fmt: skip
        assert rows[number]["bytes"] == picture(name)
        assert read_uri(rows[number]["uri"]) == picture(name)
    captions = captions_of(source)
    assert list(captions) == [row["image_id"] for row in rows]
    assert captions["train-000250"] == [f"train-00001-of-00002.parquet 0 {k}" for k in range(11)]


def test_parquet_limit_takes_the_first_of_each_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", 130, row_group_size=40)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", 130)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", 5)
    source = open_source(str(tmp_path), SourceConfig(limit=140))
    rows = read_all(source)
    assert [row["image_id"] for row in rows] == [
        *(f"test-{number:06d}" for number in range(5)),
        *(f"train-{number:06d}" for number in range(140)),
    ]
    assert list(captions_of(source)) == [row["image_id"] for row in rows]
    assert source.identity() != open_source(str(tmp_path)).identity()


def test_parquet_list_column_and_missing_captions(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", 4, captions="sentences")
    assert captions_of(open_source(str(tmp_path / "test.parquet"))) == {
        "test-000001": ["test.parquet 1 0"],
        "test-000002": ["test.parquet 2 0", "test.parquet 2 1"],
    }


def test_parquet_without_captions_or_split_is_a_test_split(tmp_path: Path) -> None:
    table = pa.table({"name": ["a", "b"], "picture": [b"1", None]})
    pq.write_table(table, tmp_path / "photos.parquet")
    source = open_source(str(tmp_path / "photos.parquet"))
    rows = read_all(source)
    assert [(row["image_id"], row["split"], row["bytes"]) for row in rows] == [
        ("image-000000", "test", b"1"),
        ("image-000001", "test", None),
    ]
    assert [row["error"] for row in rows] == [None, "no image bytes in the row"]
    assert captions_of(source) == {}


def test_parquet_with_captions_and_no_split_is_hashed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "photos.parquet", 300)
    rows = read_all(open_source(str(tmp_path)))
    assert Counter(row["split"] for row in rows).keys() == {"train", "validation", "test"}
    rows = read_all(open_source(str(tmp_path), SourceConfig(split="train")))
    assert Counter(row["split"] for row in rows) == {"train": 300}


def test_large_row_groups_are_cut_and_small_ones_joined(tmp_path: Path) -> None:
    write_parquet(tmp_path / "large.parquet", 3000, captions=None, row_group_size=3000)
    write_parquet(tmp_path / "small.parquet", 300, captions=None, row_group_size=7)
    large = open_source(str(tmp_path / "large.parquet"))
    small = open_source(str(tmp_path / "small.parquet"))
    assert len(large.images().get_read_tasks(1)) == SLICES_PER_GROUP
    assert len(small.images().get_read_tasks(1)) == 3
    for source, name in ((large, "large"), (small, "small")):
        rows = read_all(source)
        assert [row["bytes"] for row in rows] == [
            picture(f"{name}.parquet/{number}") for number in range(len(rows))
        ]


def test_a_large_row_group_is_read_in_tables_and_never_held_whole(tmp_path: Path) -> None:
    size, rows = 2**16, 3200
    images = pa.array([os.urandom(size) for _ in range(rows)], pa.binary())
    # A page holds at least one batch of what is written, 1,024 values unless told otherwise.
    pq.write_table(
        pa.table({"image": images}),
        tmp_path / "x.parquet",
        row_group_size=rows,
        use_dictionary=False,
        write_batch_size=16,
    )
    tasks = open_source(str(tmp_path)).images().get_read_tasks(1)
    assert len(tasks) == SLICES_PER_GROUP
    default = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(default)
    pa.set_memory_pool(counting)
    try:
        sizes = []
        for table in tasks[-1]():
            sizes.append(table.nbytes)
            last = table["bytes"][-1].as_py()
            del table
    finally:
        pa.set_memory_pool(default)
    assert last == images[-1].as_py()
    assert len(sizes) > 1
    assert max(sizes) < 1.1 * BYTES_PER_TABLE
    # Two tables while one follows the other, and a few pages; the slice is 25 MiB, the row group 200 MiB.
    assert max(sizes) < counting.max_memory() < 3.5 * max(sizes) < size * rows / 4


def test_damaged_parquet_pages_are_rows_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    write_parquet(path, 300, captions=None)
    source = open_source(str(path))
    data = bytearray(path.read_bytes())
    data[4:300] = bytes(296)
    path.write_bytes(data)
    rows = read_all(source)
    bad = [row for row in rows if row["bytes"] is None]
    assert [row["image_id"] for row in bad] == [f"test-{number:06d}" for number in range(100)]
    assert all(row["error"].startswith("cannot be read: ") for row in bad)
    assert all(row["error"] is None for row in rows[100:])
    path.unlink()
    rows = read_all(source)
    assert {row["error"] for row in rows} == {"cannot be read: No such file or directory"}


def write_split_column(path: Path, names: list[str | None], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(f"{path.name}/{n}"), "path": None} for n in range(len(names))]
    columns = {"image": pa.array(images, IMAGE), "split": pa.array(names, pa.string())} | more
    pq.write_table(pa.table(columns), path, row_group_size=3)


def test_parquet_split_column_decides_before_the_file_name(tmp_path: Path) -> None:
    names = ["train", "restval", "val", None, "test", "Train", "train", None]
    texts = pa.array([[f"a {number}"] for number in range(8)])
    write_split_column(tmp_path / "test-00000-of-00001.parquet", names, caption=texts)
    source = open_source(str(tmp_path))
    rows = read_all(source)
    assert [row["split"] for row in rows] == [
        "train", "train", "validation", "test", "test", "train", "train", "test",
    ]  # fmt: skip
    assert [row["image_id"] for row in rows] == [f"image-{number:06d}" for number in range(8)]
    source = open_source(str(tmp_path), SourceConfig(limit=2))
    rows = read_all(source)
    kept = [0, 1, 2, 3, 4]
    assert [row["image_id"] for row in rows] == [f"image-{number:06d}" for number in kept]
    assert [row["bytes"] for row in rows] == [
        picture(f"test-00000-of-00001.parquet/{number}") for number in kept
    ]
    assert captions_of(source) == {f"image-{number:06d}": [f"a {number}"] for number in kept}
    rows = read_all(open_source(str(tmp_path), SourceConfig(limit=1)))
    assert [row["image_id"] for row in rows] == ["image-000000", "image-000002", "image-000003"]
    assert all(read_uri(row["uri"]) == row["bytes"] for row in rows)


def test_parquet_split_column_is_counted_over_all_files(tmp_path: Path) -> None:
    write_split_column(tmp_path / "a.parquet", ["train", "test", "train"])
    write_split_column(tmp_path / "b.parquet", ["train", None, "test"])
    rows = read_all(open_source(str(tmp_path), SourceConfig(limit=2, split="validation")))
    assert [(row["image_id"], row["split"]) for row in rows] == [
        ("image-000000", "train"),
        ("image-000001", "test"),
        ("image-000002", "train"),
        ("image-000004", "validation"),
        ("image-000005", "test"),
    ]
    write_split_column(tmp_path / "b.parquet", ["train", "unseen", "test"])
    with pytest.raises(SourceError, match=r"b.parquet: column split: unknown split 'unseen'"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train-00000-of-00003", "train-00002-of-00003"],
            "train-00001-of-00003.parquet is missing",
        ),
        (
            ["train-00000-of-00001", "train-00000-of-00002"],
            "train is there as a set of 1 and 2 files",
        ),
    ],
)
def test_incomplete_parquet_sets_are_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        write_parquet(tmp_path / f"{name}.parquet", 1)
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["a"]}, r"expected a column 'image' .* it has: name \(string\)"),
        ({"image": ["a.jpg"]}, r"expected a column 'image' .* it has: image \(string\)"),
        ({"left": [b"1"], "right": [b"2"]}, "expected a column 'image'"),
        ({"image": [b"1"], "caption": [7]}, "column caption is int64, expected string"),
        ({"image": pa.array([], pa.binary())}, "hold no rows"),
    ],
)
def test_unfit_parquet_columns_are_named(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))


def test_parquet_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", 2)
    write_parquet(tmp_path / "train.parquet", 2, captions="caption")
    with pytest.raises(
        SourceError, match=r"train.parquet: its columns .* differ from test.parquet"
    ):
        open_source(str(tmp_path))
    (tmp_path / "train.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(SourceError, match=r"train.parquet: not readable as Parquet"):
        open_source(str(tmp_path))


def test_parquet_images_alone_are_read_whatever_the_captions_are(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", 3, captions=None)
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.append_column("caption", pa.array([1, 2, 3])), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="column caption is int64"):
        open_source(str(tmp_path))
    images = open_source(str(tmp_path), captions=False)
    assert len(read_all(images)) == 3
    assert captions_of(images) == {}


def test_real_flickr8k(shared: Path) -> None:
    source = open_source(str(shared / "data/flickr8k"))
    assert source.num_images() == 7000
    captions = captions_of(source)
    assert Counter(name.rpartition("-")[0] for name in captions) == {
        "train": 6000,
        "validation": 1000,
    }
    assert sum(map(len, captions.values())) == 35_000
    assert all(len(texts) == 5 for texts in captions.values())
    assert captions["train-000000"][0] == "A black dog is running after a white dog in the snow ."
    tasks = source.images().get_read_tasks(1)
    rows = next(iter(tasks[0]())).to_pylist()
    assert all(row["bytes"].startswith(b"\xff\xd8") for row in rows)
    assert max(task.metadata.num_rows for task in tasks) <= 128


def test_what_is_no_table_is_counted_as_left_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 3)
    for name in ("README.md", "x.zip", ".hidden", "more.md"):
        (tmp_path / name).write_text("no table")
    source = open_source(str(tmp_path), SourceConfig(limit=2))
    assert source.left_out() == {".md": 2, ".zip": 1, "hidden file": 1, "over the limit": 1}
