"""Tar shards and lists of files as sources."""

import json
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.artifacts.id_set import IdSet
from captioner.config import ImageLimits, SourceConfig
from captioner.errors import SourceError
from captioner.sources import open_source, shards
from tests.sources import (
    captions_of,
    picture,
    read_all,
    write_images,
    write_parquet,
    write_shard,
)


def samples(*keys: str, **texts: str) -> dict[str, bytes]:
    """A picture a key, and the texts of some."""
    members = {}
    for key in keys:
        members[f"{key}.jpg"] = picture(key)
        if key in texts:
            members[f"{key}.txt"] = texts[key].encode()
    return members


def test_names_that_are_no_text_are_counted(tmp_path: Path) -> None:
    members = samples("a") | {"caf\udce9.jpg": b"1", "\udcff.txt": b"of nothing"}
    write_shard(tmp_path / "0.tar", members)
    source = open_source(str(tmp_path))
    assert [row["image_id"] for row in read_all(source)] == ["0/a"]
    assert source.left_out() == {"name that is not UTF-8": 1}


def test_shards_as_webdataset_writes_them(tmp_path: Path) -> None:
    members = samples("a", "b.c", "x/d", a="One\nTwo\n") | {
        "./e.PNG": picture("e"),
        "e.json": b'{"caption": "Three", "url": "http://e", "status": "success"}',
        "a.seg.png": b"no picture of ours",
        "f.txt": b"of no picture",
        "g.json": b'{"status": "failed_to_download"}',
        "g.jpg": b"",
    }
    # What is after the first dot is a kind: b.c.jpg is no picture called b.
    write_shard(tmp_path / "train-000.tar", members)
    write_shard(tmp_path / "deep/test.tar.gz", samples("a", a="Four"), "w:gz")
    source = open_source(str(tmp_path))
    rows = {row["image_id"]: row for row in read_all(source)}
    assert {name: row["split"] for name, row in rows.items()} == {
        "deep/test/a": "test", "train-000/a": "train", "train-000/x/d": "train", "train-000/e": "train",
    }  # fmt: skip
    assert captions_of(source) == {
        "deep/test/a": ["Four"], "train-000/a": ["One", "Two"], "train-000/e": ["Three"],
    }  # fmt: skip
    assert rows["train-000/x/d"]["bytes"] == picture("x/d")
    assert source.left_out() == {"sample without a picture": 2, "failed download": 1}
    assert {row["split"] for row in read_all(open_source(str(tmp_path), captions=False))} == {
        "train", "test",
    }  # fmt: skip
    own = SourceConfig(limit=1, captions="none")
    assert captions_of(open_source(str(tmp_path), own)) == {}
    assert open_source(str(tmp_path), own).left_out()["over the limit"] == 2


def test_img2dataset_writes_a_table_beside_each_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "00000.tar", samples("000", "002", **{"000": "not read"}))
    columns: dict[str, list[Any]] = {
        "key": ["000", "001", "002", "003"],
        "status": ["success", "failed_to_download", "success", "success"],
        "caption": ["One", None, "Two", "Three"],
        "uid": ["u0", "u1", "u2", "u3"],
    }
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert captions_of(source) == {
        "00000/000": ["One"],
        "00000/002": ["Two"],
        "00000/003": ["Three"],
    }
    assert [(row["image_id"], row["error"]) for row in read_all(source)] == [
        ("00000/000", None), ("00000/002", None), ("00000/003", "not in the shard"),
    ]  # fmt: skip
    assert source.left_out() == {"failed download": 1, "captions file": 1, ".json": 1}
    rows = read_all(open_source(str(tmp_path), SourceConfig(id_column="uid")))
    assert [row["image_id"] for row in rows] == ["u0", "u2", "u3"]


def test_what_is_done_is_not_read_and_tables_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_BYTES_PER_TABLE", 30)
    keys = [f"{number:03}" for number in range(9)]
    write_shard(tmp_path / "x.tar", samples(*keys))
    source = open_source(str(tmp_path / "x.tar"), limits=ImageLimits(max_bytes=12))
    (task,) = source.images(IdSet([["x/000", "x/004"]])).get_read_tasks(1)
    tables = list(task())
    assert max(len(table) for table in tables) == 3
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["image_id"] for row in rows] == [
        f"x/{key}" for key in keys if key not in ("000", "004")
    ]
    assert task.metadata.num_rows == 7
    small = open_source(str(tmp_path / "x.tar"), limits=ImageLimits(max_bytes=11))
    assert read_all(small)[0]["error"] == "12 bytes, over the limit of 11"
    assert not source.images(IdSet([[f"x/{key}" for key in keys]])).get_read_tasks(1)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_shard_that_ends_early_is_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).bytes(20_000)
    members = {f"{key}.jpg": noise + key.encode() for key in "abc"}
    path = tmp_path / f"x.{suffix}"
    write_shard(path, members, "w:gz" if suffix.endswith("gz") else "w")
    whole = open_source(str(tmp_path))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        SourceError, match=rf"x.{suffix}: not readable to its end.*source-options.partial"
    ) as one:
        open_source(str(tmp_path))
    assert "\n" not in str(one.value)
    # Damage that comes later is rows with an error.
    rows = read_all(whole)
    assert rows[2]["error"].startswith("the shard is damaged: ")
    if suffix == "tar.gz":  # which is read ahead
        return
    assert [row["bytes"] is None for row in rows] == [False, True, True]
    part = open_source(str(tmp_path), SourceConfig(partial=True))
    assert part.left_out() == {"end of a damaged shard": 1}
    assert read_all(part)[0]["bytes"] == members["a.jpg"]
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(SourceError, match="not readable to its end"):
        open_source(str(tmp_path))


def test_shards_on_s3(bucket: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", samples("a", "b", a="One"))
    body = (tmp_path / "x.tar").read_bytes()
    boto3.client("s3").put_object(Bucket="bucket", Key="shards/d/x.tar", Body=body)
    for spec, stem in ((f"{bucket}/shards", "d/x"), (f"{bucket}/shards/d/x.tar", "x")):
        source = open_source(spec)
        assert {row["image_id"]: row["bytes"] for row in read_all(source)} == {
            f"{stem}/{key}": picture(key) for key in "ab"
        }
        assert captions_of(source) == {f"{stem}/a": ["One"]}


def test_a_list_names_files_wherever_they_are(bucket: str, tmp_path: Path) -> None:
    write_images(tmp_path, "near/a.jpg", "far/b.dat", "far/c d#.jpg")
    boto3.client("s3").put_object(Bucket="bucket", Key="listed/e.jpg", Body=picture("e.jpg"))
    lines = [
        "a.jpg", f"{tmp_path}/far/b.dat", f"file://{tmp_path}/far/c d#.jpg", f"{bucket}/listed/e.jpg", "", "a.jpg",
    ]  # fmt: skip
    path = tmp_path / "near/list.txt"
    path.write_text("\r\n".join(lines))
    source = open_source(str(path))
    assert [(row["image_id"], row["bytes"]) for row in read_all(source)] == [
        (lines[0], picture("near/a.jpg")), (lines[1], picture("far/b.dat")),
        (lines[2], picture("far/c d#.jpg")), (lines[3], picture("e.jpg")),
    ]  # fmt: skip
    (tmp_path / "table.csv").write_text("image,caption\na.jpg,A\ne.jpg,E\n")
    options = SourceConfig(captions=str(tmp_path / "table.csv"), split="train")
    assert captions_of(open_source(str(path), options)) == {"a.jpg": ["A"], lines[3]: ["E"]}
    path.write_text("a.jpg\ngone.jpg\n")
    with pytest.raises(
        SourceError, match=r"1 of 2 files are not there \(gone.jpg\): .*missing skip"
    ):
        open_source(str(path))
    source = open_source(str(path), SourceConfig(missing="skip"))
    assert source.num_images() == 1
    assert source.left_out() == {"missing file": 1}


def test_a_list_of_tables_or_shards(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x/a.parquet", 2)
    write_shard(tmp_path / "x/b.tar", samples("k"))
    for name, ids in (("a.parquet", ["x/a/000000", "x/a/000001"]), ("b.tar", ["x/b/k"])):
        (tmp_path / "list.txt").write_text(f"x/{name}\n")
        rows = read_all(open_source(str(tmp_path / "list.txt")))
        assert [row["image_id"] for row in rows] == ids
    (tmp_path / "list.txt").write_text("x/a.parquet\nx/b.tar\n")
    with pytest.raises(SourceError, match=r"lists both x/a.parquet and x/b.tar"):
        open_source(str(tmp_path / "list.txt"))
    write_images(tmp_path / "x", "c.jpg")
    (tmp_path / "x/a.parquet").unlink()
    with pytest.raises(SourceError, match="holds both"):
        open_source(str(tmp_path / "x"))
    assert json.dumps(open_source(str(tmp_path / "x/b.tar")).identity().model_dump())


def test_the_archive_that_images_came_in_is_left_out(tmp_path: Path) -> None:
    write_shard(tmp_path / "all.tar.gz", samples("a"), "w:gz")
    write_images(tmp_path, "images/a.jpg")
    source = open_source(str(tmp_path))
    assert [row["image_id"] for row in read_all(source)] == ["images/a.jpg"]
    assert source.left_out() == {".gz": 1}


def test_every_picture_is_taken_or_counted(tmp_path: Path) -> None:
    members = ["1.jpg", "1.png", "1.txt", "1.seg.png", "2.jpg", "deep/1.jpg"]
    write_shard(tmp_path / "x.tar", {name: name.encode() for name in members})
    source = open_source(str(tmp_path))
    assert [row["bytes"] for row in read_all(source)] == [b"1.jpg", b"2.jpg", b"deep/1.jpg"]
    assert source.left_out() == {"further picture": 1}
    # webdataset's keys end at the first dot.
    write_shard(tmp_path / "dots/x.tar", {"a.1.jpg": b"", "a.2.jpg": b""})
    with pytest.raises(SourceError, match=r"no images \(1 sample without a picture\)"):
        open_source(str(tmp_path / "dots"))
