"""Parquet files as a source: ids, splits, captions, limits, and what is refused."""

import os
import struct
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
from tests.sources import (
    IMAGE,
    captions_of,
    picture,
    read_all,
    read_uri,
    write_images,
    write_parquet,
)


def test_parquet_ids_are_a_files_path_and_a_row_of_it(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", 250)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", 30)
    write_parquet(tmp_path / "data/val-00000-of-00001.parquet", 2)
    source = open_source(str(tmp_path))
    rows = read_all(source)
    assert [row["image_id"] for row in rows] == [
        *(f"data/train-00000-of-00002/{number:06d}" for number in range(250)),
        *(f"data/train-00001-of-00002/{number:06d}" for number in range(30)),
        "data/val-00000-of-00001/000000",
        "data/val-00000-of-00001/000001",
    ]
    for number, name in ((0, "train-00000-of-00002.parquet/0"), (249, "train-00000-of-00002.parquet/249"),
                         (250, "train-00001-of-00002.parquet/0"), (281, "val-00000-of-00001.parquet/1")):  # fmt: skip
        assert rows[number]["bytes"] == picture(name)
        assert read_uri(rows[number]["uri"]) == picture(name)
    captions = captions_of(source)
    assert list(captions) == [row["image_id"] for row in rows]
    assert captions["data/train-00001-of-00002/000000"] == [
        f"train-00001-of-00002.parquet 0 {k}" for k in range(11)
    ]


def test_parquet_limit_takes_the_first_of_each_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", 130, row_group_size=40)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", 130)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", 5)
    source = open_source(str(tmp_path), SourceConfig(limit=140))
    rows = read_all(source)
    assert [row["image_id"] for row in rows] == [
        *(f"test-00000-of-00001/{number:06d}" for number in range(5)),
        *(f"train-00000-of-00002/{number:06d}" for number in range(130)),
        *(f"train-00001-of-00002/{number:06d}" for number in range(10)),
    ]
    assert list(captions_of(source)) == [row["image_id"] for row in rows]
    assert source.identity() != open_source(str(tmp_path)).identity()


def test_parquet_list_column_and_missing_captions(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", 4, captions="sentences")
    assert captions_of(open_source(str(tmp_path / "test.parquet"))) == {
        "test/000001": ["test.parquet 1 0"],
        "test/000002": ["test.parquet 2 0", "test.parquet 2 1"],
    }


def test_parquet_without_captions_or_split_is_a_test_split(tmp_path: Path) -> None:
    table = pa.table({"name": ["a", "b"], "picture": [b"1", None]})
    pq.write_table(table, tmp_path / "photos.parquet")
    source = open_source(str(tmp_path / "photos.parquet"))
    rows = read_all(source)
    assert [(row["image_id"], row["split"], row["bytes"]) for row in rows] == [
        ("photos/000000", "test", b"1"),
        ("photos/000001", "test", None),
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
    assert [row["image_id"] for row in bad] == [f"test/{number:06d}" for number in range(100)]
    assert all(row["error"].startswith("cannot be read: ") for row in bad)
    assert all(row["error"] is None for row in rows[100:])
    path.rename(tmp_path / "another.parquet")
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
    stem = "test-00000-of-00001"
    source = open_source(str(tmp_path))
    rows = read_all(source)
    assert [row["split"] for row in rows] == [
        "train", "train", "validation", "test", "test", "train", "train", "test",
    ]  # fmt: skip
    assert [row["image_id"] for row in rows] == [f"{stem}/{number:06d}" for number in range(8)]
    source = open_source(str(tmp_path), SourceConfig(limit=2))
    rows = read_all(source)
    kept = [0, 1, 2, 3, 4]
    assert [row["image_id"] for row in rows] == [f"{stem}/{number:06d}" for number in kept]
    assert [row["bytes"] for row in rows] == [
        picture(f"test-00000-of-00001.parquet/{number}") for number in kept
    ]
    assert captions_of(source) == {f"{stem}/{number:06d}": [f"a {number}"] for number in kept}
    rows = read_all(open_source(str(tmp_path), SourceConfig(limit=1)))
    assert [row["image_id"] for row in rows] == [f"{stem}/{number:06d}" for number in (0, 2, 3)]
    assert all(read_uri(row["uri"]) == row["bytes"] for row in rows)


def test_parquet_split_column_is_counted_over_all_files(tmp_path: Path) -> None:
    write_split_column(tmp_path / "a.parquet", ["train", "test", "train"])
    write_split_column(tmp_path / "b.parquet", ["train", None, "test"])
    rows = read_all(open_source(str(tmp_path), SourceConfig(limit=2, split="validation")))
    assert [(row["image_id"], row["split"]) for row in rows] == [
        ("a/000000", "train"),
        ("a/000001", "test"),
        ("a/000002", "train"),
        ("b/000001", "validation"),
        ("b/000002", "test"),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train-00000-of-00003", "train-00002-of-00003"],
            "train-00001-of-00003.parquet is missing; source-options.partial goes on",
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
    assert len(read_all(open_source(str(tmp_path), SourceConfig(partial=True)))) == 2


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


def test_each_parquet_file_has_columns_of_its_own(tmp_path: Path) -> None:
    """Texts in one, lists in another, records in a third, none in the last."""
    write_parquet(tmp_path / "test.parquet", 2, captions=None)
    write_parquet(tmp_path / "train.parquet", 2, captions="captions")
    images = pa.array([b"1", b"2"])
    records = pa.array([[{"raw": "A", "sentid": 1}, {"raw": "B", "sentid": 2}], None])
    pq.write_table(pa.table({"image": images, "sentences": records}), tmp_path / "val.parquet")
    table = {"mask": images, "jpg": images, "text": ["C", " "]}
    pq.write_table(pa.table(table), tmp_path / "dev.parquet")
    empty = {"image": images, "caption": pa.nulls(2)}
    pq.write_table(pa.table(empty), tmp_path / "test2.parquet")
    source = open_source(str(tmp_path))
    assert captions_of(source) == {
        "dev/000000": ["C"], "train/000001": ["train.parquet 1 0"], "val/000000": ["A", "B"],
    }  # fmt: skip
    assert Counter(row["split"] for row in read_all(source)) == {
        "test": 4, "train": 2, "validation": 4,
    }  # fmt: skip
    (tmp_path / "train.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(SourceError, match=r"train.parquet: not readable as Parquet"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary_view(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.struct([("path", pa.string()), ("bytes", pa.binary_view())]),
    ],
    ids=str,
)
def test_any_type_of_images_and_texts_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    data = [picture("a"), picture("b"), None]
    if pa.types.is_struct(kind):
        images = pa.StructArray.from_arrays(
            [pa.nulls(3, pa.string()), pa.array(data, pa.binary()).cast(pa.binary_view())],
            ["path", "bytes"],
        )
    else:
        images = pa.array(data, pa.binary())
        images = images.dictionary_encode() if pa.types.is_dictionary(kind) else images.cast(kind)
    texts = pa.array(["A", "B", "C"]).cast(pa.string_view())
    pq.write_table(pa.table({"image": images, "caption": texts}), tmp_path / "x.parquet")
    assert open_file(tmp_path, "image").type == images.type
    source = open_source(str(tmp_path), SourceConfig(split="train"))
    rows = read_all(source)
    assert [row["bytes"] for row in rows] == data
    assert rows[2]["error"] == "no image bytes in the row"
    assert list(captions_of(source).values()) == [["A"], ["B"], ["C"]]


def open_file(folder: Path, column: str) -> pa.Field:
    return pq.read_schema(folder / "x.parquet").field(column)


def test_rows_may_name_files_beside_the_table(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", "b.dat")
    (tmp_path / "set/images").mkdir(parents=True)
    (tmp_path / "set/images/a.dat").write_bytes(picture("a"))
    paths = ["images/a.dat", str(tmp_path / "elsewhere/b.dat"), "images/gone.dat", None, "x"]
    cells = [{"bytes": None, "path": path} for path in paths]
    cells[4]["bytes"] = picture("inside")  # type: ignore[typeddict-item]
    write = {"image": pa.array(cells, IMAGE), "caption": ["A"] * 5}
    pq.write_table(pa.table(write), tmp_path / "set/x.parquet")
    rows = read_all(open_source(str(tmp_path / "set")))
    assert [row["bytes"] for row in rows] == [
        picture("a"), picture("b.dat"), None, None, picture("inside"),
    ]  # fmt: skip
    assert [row["error"] for row in rows][2:] == [
        "images/gone.dat cannot be read: No such file or directory",
        "no image bytes in the row",
        None,
    ]
    alone = pa.array([{"path": path} for path in paths], pa.struct([("path", pa.string())]))
    pq.write_table(pa.table({"image": alone}), tmp_path / "set/x.parquet")
    rows = read_all(open_source(str(tmp_path / "set")))
    assert [row["bytes"] for row in rows][:2] == [picture("a"), picture("b.dat")]


def test_a_folder_may_hold_a_table_and_the_images_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"images/{number:02}.jpg" for number in range(20)]
    write_images(tmp_path, *names)
    (tmp_path / "notes.pdf").touch()
    cells = pa.array([{"bytes": None, "path": name} for name in names], IMAGE)
    pq.write_table(pa.table({"image": cells, "caption": names}), tmp_path / "x.parquet")
    source = open_source(str(tmp_path))
    assert [row["bytes"] for row in read_all(source)] == [picture(name) for name in names]
    assert source.left_out() == {".pdf": 1}
    # Few at a time, for each may be large.
    tables = [table for task in source.images().get_read_tasks(1) for table in task()]
    assert max(map(len, tables)) == 8
    monkeypatch.setattr("captioner.sources.parquet_rows._LARGEST_FILE", 9)
    assert read_all(source)[0]["error"] == "images/00.jpg has 22 bytes"
    # One that holds its images is another data set than the images beside it.
    write_parquet(tmp_path / "y.parquet", 3)
    with pytest.raises(SourceError, match="holds both Parquet files"):
        open_source(str(tmp_path))


def test_columns_of_parquet_are_named_by_flags(tmp_path: Path) -> None:
    table = {
        "left": [b"1", b"2"], "right": [b"3", b"4"], "alt": ["A", "B"], "title": [["C"], ["D", "E"]],
        "fold": ["dev", "test"], "sku": [17, 18],
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    options: dict[str, Any] = {
        "image_column": "right", "caption_columns": ["title", "alt"], "split_column": "fold", "id_column": "sku",
    }  # fmt: skip
    source = open_source(str(tmp_path), SourceConfig(**options))
    assert captions_of(source) == {"17": ["C", "A"], "18": ["D", "E", "B"]}
    assert [(row["image_id"], row["split"], row["bytes"]) for row in read_all(source)] == [
        ("17", "validation", b"3"),
        ("18", "test", b"4"),
    ]
    for flag, wrong, told in (
        ("image_column", "alt", "column alt is string, expected images"),
        (
            "caption_columns",
            ["none"],
            "no column 'none', which source-options.caption-columns names",
        ),
        ("caption_columns", ["sku"], "column sku is int64, expected string"),
        ("split_column", "none", "no column 'none', which source-options.split-column names"),
        ("id_column", "none", "no column 'none', which source-options.id-column names"),
        ("id_column", "one", "x.parquet#0 and .*x.parquet#1 have the same id 'a'"),
        ("captions", "some.csv", "holds captions in columns: source-options.caption-columns"),
    ):
        pq.write_table(pa.table(table | {"one": ["a", "a"]}), tmp_path / "x.parquet")
        with pytest.raises(SourceError, match=told):
            open_source(str(tmp_path), SourceConfig(**options | {flag: wrong}))
    without = SourceConfig(image_column="left", captions="none")
    assert captions_of(open_source(str(tmp_path), without)) == {}


def test_parquet_ids_stay_whatever_comes_and_goes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", 3)
    before = {row["image_id"]: row["bytes"] for row in read_all(open_source(str(tmp_path)))}
    write_parquet(tmp_path / "a.parquet", 2)
    write_parquet(tmp_path / "b/c.parquet", 2)
    after = {row["image_id"]: row["bytes"] for row in read_all(open_source(str(tmp_path)))}
    assert after.items() > before.items()
    alone = read_all(open_source(str(tmp_path / "b.parquet")))
    assert {row["image_id"]: row["bytes"] for row in alone} == before


def test_splits_that_are_none_of_three_train_where_others_do(tmp_path: Path) -> None:
    """By file names and by a column; what is not called one must not join a published test split."""
    for name in ("train-00000-of-00001", "test-00000-of-00001", "unlabeled-00000-of-00001"):
        write_parquet(tmp_path / f"{name}.parquet", 2)
    rows = read_all(open_source(str(tmp_path)))
    assert Counter(row["split"] for row in rows) == {"train": 4, "test": 2}
    for path in tmp_path.iterdir():
        path.unlink()
    texts = pa.array([["A"]] * 3)
    write_split_column(tmp_path / "x.parquet", ["test", "unlabeled", None], caption=texts)
    rows = read_all(open_source(str(tmp_path)))
    assert [row["split"] for row in rows] == ["test", "train", "train"]
    rows = read_all(open_source(str(tmp_path), SourceConfig(split="validation")))
    assert [row["split"] for row in rows] == ["test", "validation", "validation"]


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
    assert Counter(name.partition("-")[0] for name in captions) == {
        "train": 6000,
        "validation": 1000,
    }
    assert sum(map(len, captions.values())) == 35_000
    assert all(len(texts) == 5 for texts in captions.values())
    assert (
        captions["train-00000-of-00003/000000"][0]
        == "A black dog is running after a white dog in the snow ."
    )
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


@pytest.mark.parametrize("column", ["caption", "split", "own"])
def test_text_that_is_no_text_is_one_line(tmp_path: Path, column: str) -> None:
    ends = pa.py_buffer(struct.pack("<3i", 0, 1, 2))
    texts = pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"a\xff")])
    pq.write_table(pa.table({"image": [b"1", b"2"], column: texts}), tmp_path / "a.parquet")
    options = SourceConfig(id_column="own" if column == "own" else None)
    with pytest.raises(SourceError, match=r"a\.parquet: .* cannot be read: 'utf-8' codec"):
        captions_of(open_source(str(tmp_path), options))
    # Where it is a picture's name it is that picture's.
    image = pa.StructArray.from_arrays([pa.nulls(2, pa.binary()), texts], ["bytes", "path"])
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    write_images(tmp_path, "a")
    first, second = read_all(open_source(str(tmp_path)))
    assert first["bytes"] == picture("a")
    assert second["error"].startswith("\ufffd cannot be read: ")
