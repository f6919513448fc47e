"""Every source through Ray Data, row checkpointing included, and what they refuse."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig

from captioner.artifacts.schema import CAPTION_ROWS, SOURCE_ROWS
from captioner.config import ImageLimits, ShapesConfig, SourceConfig
from captioner.errors import SourceError
from captioner.sources import hub, open_source, read_image
from captioner.sources.base import Source
from captioner.sources.parquet_rows import BYTES_PER_TABLE, SLICES_PER_GROUP

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read_all(source: Source) -> list[dict[str, Any]]:
    """All rows, by the tasks alone, without Ray."""
    rows = []
    for task in source.images().get_read_tasks(1):
        tables = list(task())
        assert sum(len(table) for table in tables) == task.metadata.num_rows
        for table in tables:
            assert table.schema == SOURCE_ROWS
            rows += table.to_pylist()
    assert len(rows) == source.num_images()
    assert len({row["image_id"] for row in rows}) == len(rows)
    return rows


def captions_of(source: Source) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for batch in source.captions():
        assert batch.schema == CAPTION_ROWS
        for row in batch.to_pylist():
            texts = captions.setdefault(row["image_id"], [])
            assert row["index"] == len(texts)
            texts.append(row["caption"])
    return captions


def picture(name: str) -> bytes:
    """Not an image: sources never look inside."""
    return f"bytes of {name}".encode()


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(name))


def write_parquet(
    path: Path, rows: int, *, captions: str | None = "numbered", row_group_size: int = 100
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(rows)
    columns: dict[str, Any] = {
        "image": pa.array(
            [{"bytes": picture(f"{path.name}/{n}"), "path": None} for n in numbers], IMAGE
        )
    }
    if captions == "numbered":
        # Eleven columns: caption_10 comes after caption_9, not after caption_1.
        columns |= {f"caption_{k}": [f"{path.name} {n} {k}" for n in numbers] for k in range(11)}
    elif captions:
        columns[captions] = pa.array(
            [[f"{path.name} {n} {k}" for k in range(n % 3)] for n in numbers]
        )
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network: the hub's client reads the variables at import only."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def hub_table(name: str, split: str, rows: int) -> pa.Table:
    """Rows in the schema of the hub's copy."""
    images = pa.array(
        [{"bytes": picture(f"{split}/{n}"), "path": None} for n in range(rows)], IMAGE
    )
    texts = [[f"{split} {n} {k}" for k in range(5)] for n in range(rows)]
    if name == "flickr8k":
        columns = {f"caption_{k}": pa.array([five[k] for five in texts]) for k in range(5)}
    else:
        columns = {
            "caption": pa.array(texts),
            "sentids": pa.array([[str(5 * n + k) for k in range(5)] for n in range(rows)]),
            # The files' names decide: the copy's card vouches for these, not for the column.
            "split": pa.array(["test"] * rows),
            "img_id": pa.array([str(n) for n in range(rows)]),
            "filename": pa.array([f"{n}.jpg" for n in range(rows)]),
        }
    return pa.table({"image": images} | columns)


def fill_cache(cache: Path, name: str, rows: dict[str, int]) -> None:
    """What a download leaves: blobs, a snapshot of links to them, a reference."""
    root = cache / f"datasets--{hub.REPOSITORIES[name].name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / commit / "data"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for split, count in rows.items():
        file = f"{split}-00000-of-00001-7025a2b596f14b7b.parquet"
        pq.write_table(hub_table(name, split, count), root / file)
        blob = root / "blobs" / hashlib.sha256((root / file).read_bytes()).hexdigest()
        (root / file).rename(blob)
        (snapshot / file).symlink_to(blob)


# --- through Ray Data


def checkpointed(source: Source, checkpoint: Path, output: Path) -> None:
    context = DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="image_id", checkpoint_path=str(checkpoint), delete_checkpoint_on_success=False
    )
    try:
        ray.data.read_datasource(source.images()).write_parquet(str(output))
    finally:
        context.checkpoint_config = None


def make_source(kind: str, folder: Path, limit: int | None) -> Source:
    options = SourceConfig(limit=limit, shapes=ShapesConfig(train=40, validation=10, test=10))
    if kind == "shapes":
        return open_source("shapes", options)
    if kind == "parquet":
        write_parquet(folder / "train-00000-of-00001.parquet", 40, row_group_size=15)
        write_parquet(folder / "test-00000-of-00001.parquet", 20)
    else:
        write_images(folder, *(f"{number:02d}.jpg" for number in range(60)))
    return open_source(str(folder), options)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", ["parquet", "folder", "shapes"])
def test_checkpointed_read_skips_done_images(tmp_path: Path, kind: str) -> None:
    part = make_source(kind, tmp_path / "in", limit=5)
    whole = make_source(kind, tmp_path / "in", limit=None)
    checkpointed(part, tmp_path / "checkpoint", tmp_path / "first")
    checkpointed(whole, tmp_path / "checkpoint", tmp_path / "second")
    done = set(pq.read_table(tmp_path / "first")["image_id"].to_pylist())
    rest = pq.read_table(tmp_path / "second")["image_id"].to_pylist()
    assert 0 < len(done) == part.num_images() < whole.num_images() == 60
    assert len(rest) == len(set(rest)) == whole.num_images() - len(done)
    assert not done & set(rest)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", ["shapes", "parquet", "folder"])
def test_ray_reads_the_rows_the_tasks_make(tmp_path: Path, kind: str) -> None:
    source = make_source(kind, tmp_path, limit=None)
    expected = {row["image_id"]: row for row in read_all(source)}
    rows = ray.data.read_datasource(source.images()).take_all()
    assert {row["image_id"]: row for row in rows} == expected
    assert ray.data.read_datasource(source.images()).limit(7).count() == 7


@pytest.mark.usefixtures("local_ray")
def test_small_folder_is_read_by_every_cpu(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{number:03d}.jpg" for number in range(100)))
    tasks = open_source(str(tmp_path)).images().get_read_tasks(1)
    assert len(tasks) >= 2 * ray.cluster_resources()["CPU"]


# --- shapes


def test_shapes_have_their_splits_and_five_captions_each() -> None:
    source = open_source(
        "shapes", SourceConfig(shapes=ShapesConfig(train=130, validation=3, test=2))
    )
    rows = read_all(source)
    assert Counter(row["split"] for row in rows) == {"train": 130, "validation": 3, "test": 2}
    captions = captions_of(source)
    assert list(captions) == [row["image_id"] for row in rows]
    assert all(len(texts) == 5 for texts in captions.values())
    assert read_image(rows[7]["uri"]) == rows[7]["bytes"]
    other_seed = ShapesConfig(train=130, validation=3, test=2, seed=1)
    assert open_source("shapes", SourceConfig(shapes=other_seed)).identity() != source.identity()


# --- Parquet


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
        assert read_image(rows[number]["uri"]) == picture(name)
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
    assert list(source.captions()) == []


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
    assert all(read_image(row["uri"]) == row["bytes"] for row in rows)


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


# --- folders


def test_folder_takes_images_alone_and_names_them_by_their_paths(tmp_path: Path) -> None:
    write_images(
        tmp_path, "b.JPG", "a/c.jpeg", "a/b.png", "notes.txt", ".hidden.jpg", ".cache/x.jpg"
    )
    source = open_source(str(tmp_path))
    rows = read_all(source)
    assert [row["image_id"] for row in rows] == ["a/b.png", "a/c.jpeg", "b.JPG"]
    assert {row["split"] for row in rows} == {"test"}
    assert all(row["bytes"] == picture(row["image_id"]) == read_image(row["uri"]) for row in rows)
    assert list(source.captions()) == []
    rows = read_all(open_source(str(tmp_path), SourceConfig(split="train", limit=2)))
    assert [(row["image_id"], row["split"]) for row in rows] == [
        ("a/b.png", "train"),
        ("a/c.jpeg", "train"),
    ]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_names_of_any_characters_are_read_by_task_and_by_uri(tmp_path: Path, prefix: str) -> None:
    names = (
        "a#b.jpg",
        "c d.png",
        "e%20f.jpg",
        "g?h.jpg",
        "x.parquet#1/i.jpg",
        "_DSC1.jpg",
        "ž/日本.jpg",
    )
    write_images(tmp_path / "images", *names)
    write_parquet(tmp_path / "tables/a#1 b%20.parquet", 2, captions=None)
    rows = read_all(open_source(prefix + str(tmp_path / "images")))
    assert sorted(row["image_id"] for row in rows) == sorted(names)
    rows += read_all(open_source(prefix + str(tmp_path / "tables")))
    assert len(rows) == len(names) + 2
    assert all(row["bytes"] == read_image(row["uri"]) for row in rows)
    with pytest.raises(SourceError, match="no image there"):
        read_image(str(tmp_path / "tables/a#1 b%20.parquet#2"))


def test_folder_passes_over_what_jobs_write(tmp_path: Path) -> None:
    write_images(
        tmp_path, "a.jpg", "run/report/_job.json", "run/report/grid.png", "_temporary/b.jpg"
    )
    write_parquet(tmp_path / "run/features/part.parquet", 1)
    (tmp_path / "run/features/_job.json").write_text("{}")
    rows = read_all(open_source(str(tmp_path)))
    assert [row["image_id"] for row in rows] == ["a.jpg"]
    with pytest.raises(SourceError, match="report: written by a job"):
        open_source(str(tmp_path / "run/report"))


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    write_images(tmp_path, "in/a.jpg", "out/b.jpg", "out/c.jpg")
    (tmp_path / "in/link.jpg").symlink_to("../out/b.jpg")
    (tmp_path / "in/folder").symlink_to("../out")
    (tmp_path / "in/dangling.jpg").symlink_to("nowhere.jpg")
    rows = read_all(open_source(str(tmp_path / "in")))
    assert {row["image_id"]: row["bytes"] for row in rows} == {
        "a.jpg": picture("in/a.jpg"),
        "folder/b.jpg": picture("out/b.jpg"),
        "folder/c.jpg": picture("out/c.jpg"),
        "link.jpg": picture("out/b.jpg"),
    }


def test_equal_names_in_two_folders_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    write_images(tmp_path, "x/a.jpg", "y/a.jpg", "y/b.jpg")
    table = "image,caption\nx/a.jpg,One\ny/a.jpg,Two\nx/a.jpg,Three\n"
    (tmp_path / "captions.csv").write_text(table)
    source = open_source(str(tmp_path))
    assert source.num_images() == len(read_all(source)) == 3
    assert captions_of(source) == {"x/a.jpg": ["One", "Three"], "y/a.jpg": ["Two"]}


def test_single_file_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    write_images(tmp_path, "photo.dat", "other.jpg")
    rows = read_all(open_source(str(tmp_path / "photo.dat")))
    assert [(row["image_id"], row["bytes"]) for row in rows] == [
        ("photo.dat", picture("photo.dat"))
    ]


def test_unreadable_and_oversized_files_are_rows_with_an_error(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "c.jpg").write_bytes(bytes(101))
    source = open_source(str(tmp_path), limits=ImageLimits(max_bytes=100))
    (tmp_path / "b.jpg").unlink()
    rows = read_all(source)
    assert [row["error"] for row in rows] == [
        None,
        "cannot be read: No such file or directory",
        "101 bytes, over the limit of 100",
    ]
    assert [row["bytes"] is None for row in rows] == [False, True, True]


def test_changed_folder_has_another_identity(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg")
    identities = [open_source(str(tmp_path)).identity()]
    assert open_source(str(tmp_path)).identity() == identities[0]
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,A cat\n")
    identities.append(open_source(str(tmp_path)).identity())
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,A dog\n")
    identities.append(open_source(str(tmp_path)).identity())
    (tmp_path / "b.jpg").write_bytes(b"longer than it was before")
    identities.append(open_source(str(tmp_path)).identity())
    identities.append(open_source(str(tmp_path), SourceConfig(split="train")).identity())
    assert len({identity.model_dump_json() for identity in identities}) == 5


def test_flickr8k_archive_as_it_is(tmp_path: Path) -> None:
    """Lists of names, lemmas beside the captions, captions of an image that does not exist, unlisted images."""
    write_images(tmp_path, *(f"Flicker8k_Dataset/{name}.jpg" for name in "abcd"))
    text = tmp_path / "Flickr8k_text"
    text.mkdir()
    lines = [
        f"{name}#{index}\t{name} {index}"
        for name in ("a.jpg", "b.jpg", "d.jpg.1")
        for index in (0, 1)
    ]
    (text / "Flickr8k.token.txt").write_text("\n".join(lines))
    (text / "Flickr8k.lemma.token.txt").write_text("\n".join(lines))
    (text / "Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    (text / "Flickr_8k.devImages.txt").write_text("b.jpg\n")
    (text / "Flickr_8k.testImages.txt").write_text("c.jpg\n")
    source = open_source(str(tmp_path))
    # d.jpg is in no list, and must not join the published test split.
    assert [row["split"] for row in read_all(source)] == ["train", "validation", "test", "train"]
    assert captions_of(source) == {
        "Flicker8k_Dataset/a.jpg": ["a.jpg 0", "a.jpg 1"],
        "Flicker8k_Dataset/b.jpg": ["b.jpg 0", "b.jpg 1"],
    }
    (text / "Flickr_8k.testImages.txt").write_text("c.jpg\na.jpg\n")
    with pytest.raises(SourceError, match=r"a.jpg is in the \w+ list too"):
        open_source(str(tmp_path))


def test_karpathy_splits_and_captions_given_by_a_setting(tmp_path: Path) -> None:
    write_images(tmp_path / "images", "val2014/1.jpg", "2.jpg", "3.jpg")
    images = [
        {
            "filepath": "val2014",
            "filename": "1.jpg",
            "split": "restval",
            "sentences": [{"raw": "One."}],
        },
        {"filename": "2.jpg", "split": "test", "sentences": [{"raw": "Two."}, {"raw": "Zwei."}]},
    ]
    (tmp_path / "mine.json").write_text(json.dumps({"images": images}))
    options = SourceConfig(captions=str(tmp_path / "mine.json"), split="validation")
    source = open_source(str(tmp_path / "images"), options)
    assert {row["image_id"]: row["split"] for row in read_all(source)} == {
        "2.jpg": "test",
        "3.jpg": "validation",
        "val2014/1.jpg": "train",
    }
    assert captions_of(source) == {"2.jpg": ["Two.", "Zwei."], "val2014/1.jpg": ["One."]}


def test_coco_folder_joins_its_captions_files(tmp_path: Path) -> None:
    write_images(tmp_path, "train2014/1.jpg", "val2014/2.jpg")
    (tmp_path / "annotations").mkdir()
    for split, number in (("train", 1), ("val", 2)):
        content = {
            "images": [{"id": number, "file_name": f"{number}.jpg"}],
            "annotations": [{"id": 1, "image_id": number, "caption": f"Number {number}."}],
        }
        path = tmp_path / f"annotations/captions_{split}2014.json"
        path.write_text(json.dumps(content))
    source = open_source(str(tmp_path))
    assert [row["split"] for row in read_all(source)] == ["train", "validation"]
    assert captions_of(source) == {"train2014/1.jpg": ["Number 1."], "val2014/2.jpg": ["Number 2."]}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("c.jpg,A cat", "captions for image c.jpg, which is not there"),
        ("a.jpg,A cat", "captions for image a.jpg, which two images could be"),
        ("b.jpg,A cat\nb,A cat", "captions for image x/b.jpg are given twice"),
    ],
)
def test_captions_that_contradict_the_images_are_refused(
    tmp_path: Path, table: str, message: str
) -> None:
    write_images(tmp_path, "x/a.jpg", "y/a.jpg", "x/b.jpg")
    (tmp_path / "captions.csv").write_text(f"image,caption\n{table}\n")
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))
    # Whoever wants the images alone is not stopped by them.
    images = open_source(str(tmp_path), captions=False)
    assert {row["image_id"] for row in read_all(images)} == {"x/a.jpg", "y/a.jpg", "x/b.jpg"}
    assert {row["split"] for row in read_all(images)} == {"test"}
    assert captions_of(images) == {}


def test_parquet_images_alone_are_read_whatever_the_captions_are(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", 3, captions=None)
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.append_column("caption", pa.array([1, 2, 3])), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="column caption is int64"):
        open_source(str(tmp_path))
    images = open_source(str(tmp_path), captions=False)
    assert len(read_all(images)) == 3
    assert captions_of(images) == {}


def test_nothing_to_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "both", "a.jpg")
    write_parquet(tmp_path / "both/b.parquet", 1)
    write_images(tmp_path / "images", "a.jpg")
    (tmp_path / "names").mkdir()
    with open(os.fsencode(tmp_path) + b"/names/\xff.jpg", "wb") as file:
        file.write(b"1")
    absent = SourceConfig(captions=str(tmp_path / "absent.txt"))
    cases = (
        (tmp_path / "absent", SourceConfig(), "no such file or directory, nor one of shapes"),
        (tmp_path / "empty", SourceConfig(), "no images and no Parquet files"),
        (tmp_path / "both", SourceConfig(), "holds both Parquet files"),
        (tmp_path / "images", absent, "absent.txt"),
        (tmp_path / "names", SourceConfig(), "a file whose name is not UTF-8"),
        ("odd://somewhere", SourceConfig(), "Unrecognized filesystem"),
    )
    for spec, options, message in cases:
        with pytest.raises(SourceError, match=message) as raised:
            open_source(str(spec), options)
        assert "\n" not in str(raised.value)


# --- the hub


@pytest.mark.parametrize("name", sorted(hub.REPOSITORIES))
def test_hub_names_are_read_from_the_cache(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    images = {"train": 3, "validation": 2, "test": 2}
    repository = hub.Repository(hub.REPOSITORIES[name].name, images)
    monkeypatch.setitem(hub.REPOSITORIES, name, repository)
    written = {"train": 3, "validation" if name == "flickr8k" else "val": 2, "test": 2}
    fill_cache(hub_cache, name, written)
    source = open_source(name, SourceConfig(limit=2))
    rows = read_all(source)
    assert Counter(row["split"] for row in rows) == {"train": 2, "validation": 2, "test": 2}
    captions = captions_of(source)
    assert list(captions) == [row["image_id"] for row in rows]
    assert all(
        row["bytes"] == picture(captions[row["image_id"]][0].rpartition(" ")[0].replace(" ", "/"))
        for row in rows
    )
    assert {len(texts) for texts in captions.values()} == {5}
    assert source.identity().uri == name
    monkeypatch.setitem(images, "test", 7)
    with pytest.raises(
        SourceError, match="holds 2 test, 3 train, 2 validation images, expected 7 test"
    ):
        open_source(name)


@pytest.mark.parametrize("name", sorted(hub.REPOSITORIES))
@pytest.mark.usefixtures("hub_cache")
def test_hub_without_cache_and_network_says_what_to_do(name: str) -> None:
    with pytest.raises(SourceError) as raised:
        open_source(name)
    message = str(raised.value)
    assert hub.REPOSITORIES[name].name in message
    assert f"hf download --repo-type dataset {hub.REPOSITORIES[name].name}" in message
    assert "\n" not in message


# --- real data


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


def test_real_originals(shared: Path) -> None:
    source = open_source(str(shared / "data/originals"))
    rows = read_all(source)
    assert len(rows) == 60
    assert all(row["bytes"].startswith(b"\xff\xd8") for row in rows)
    assert {name: len(texts) for name, texts in captions_of(source).items()} == {
        row["image_id"]: 5 for row in rows
    }
    assert os.path.getsize(rows[0]["uri"]) == len(rows[0]["bytes"])
