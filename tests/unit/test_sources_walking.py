"""Which files below a folder are a source's images, and by what names."""

import os
import subprocess
from pathlib import Path

import boto3
import pytest

from captioner import storage
from captioner.artifacts.manifests import SourceIdentity
from captioner.config import SourceConfig
from captioner.errors import SourceError
from captioner.sources import open_source
from tests.sources import captions_of, picture, read_all, read_uri, write_images, write_parquet


def test_folder_takes_images_alone_and_names_them_by_their_paths(tmp_path: Path) -> None:
    write_images(
        tmp_path, "b.JPG", "a/c.jpeg", "a/b.png", "notes.txt", ".hidden.jpg", ".cache/x.jpg"
    )
    source = open_source(str(tmp_path))
    rows = read_all(source)
    assert [row["image_id"] for row in rows] == ["a/b.png", "a/c.jpeg", "b.JPG"]
    assert {row["split"] for row in rows} == {"test"}
    assert all(row["bytes"] == picture(row["image_id"]) == read_uri(row["uri"]) for row in rows)
    assert captions_of(source) == {}
    assert source.left_out() == {"hidden file": 2, ".txt": 1}
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
    assert all(row["bytes"] == read_uri(row["uri"]) for row in rows)


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


def test_single_file_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    write_images(tmp_path, "photo.dat", "other.jpg")
    rows = read_all(open_source(str(tmp_path / "photo.dat")))
    assert [(row["image_id"], row["bytes"]) for row in rows] == [
        ("photo.dat", picture("photo.dat"))
    ]


def test_nothing_to_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "both", "a.jpg")
    write_parquet(tmp_path / "both/b.parquet", 1)
    write_images(tmp_path / "images", "a.jpg")
    (tmp_path / "names").mkdir()
    with open(os.fsencode(tmp_path) + b"/names/\xff.jpg", "wb") as file:
        file.write(b"1")
    os.mkfifo(tmp_path / "pipe.jpg")
    absent = SourceConfig(captions=str(tmp_path / "absent.txt"))
    cases = (
        (tmp_path / "absent", SourceConfig(), "no such file or directory, nor one of shapes"),
        (tmp_path / "empty", SourceConfig(), "no images, no shards and no Parquet files"),
        (tmp_path / "both", SourceConfig(), "holds both Parquet files"),
        (tmp_path / "images", absent, "absent.txt"),
        (tmp_path / "pipe.jpg", SourceConfig(), "pipe.jpg: neither a file nor a directory"),
        (
            tmp_path / "names",
            SourceConfig(),
            "no images, no shards and no Parquet files .1 name that is not UTF-8",
        ),
        (tmp_path / "images", SourceConfig(exclude=("*.gif",)), r"'\*.gif' matches no file"),
        ("odd://somewhere", SourceConfig(), "Unrecognized filesystem"),
    )
    for spec, options, message in cases:
        with pytest.raises(SourceError, match=message) as raised:
            open_source(str(spec), options)
        assert "\n" not in str(raised.value)


def test_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    """Under a root that is itself reached by a link."""
    write_images(tmp_path, "real/x/a.jpg", "real/y/b.jpg", "real/.store/c.jpg", "out/d.jpg")
    (tmp_path / "root").symlink_to("real")
    for link, target in (
        ("real/x/up", "../../real"),
        ("real/x/above", "../.."),
        ("real/x/itself", "."),
        ("real/x/to_y", "../y"),
        ("real/y/to_x", str(tmp_path / "root/x")),
        ("real/stored", ".store"),
        ("real/out", "../out"),
        ("out/back", "../real"),
        ("out/again", "../out"),
    ):
        (tmp_path / link).symlink_to(target)
    source = open_source(str(tmp_path / "root"))
    rows = {row["image_id"]: row["bytes"] for row in read_all(source)}
    assert rows == {
        "out/d.jpg": picture("out/d.jpg"),
        "stored/c.jpg": picture("real/.store/c.jpg"),
        "x/a.jpg": picture("real/x/a.jpg"),
        "y/b.jpg": picture("real/y/b.jpg"),
    }
    assert source.left_out() == {"circular link": 4, "repeated link": 3, "hidden file": 1}


def test_folders_may_lie_deeper_than_calls_may(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        Path("deep.jpg").write_bytes(b"1")
    finally:
        os.chdir(here)
    write_images(tmp_path, "d.jpg", "e.jpg")
    source = open_source(str(tmp_path))
    expected = ["d.jpg", "d/" * 1200 + "deep.jpg", "e.jpg"]
    assert [row["image_id"] for row in read_all(source)] == expected
    subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)  # pytest's own goes only so deep


def test_what_cannot_be_named_or_entered_is_counted(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "locked/b.jpg", "locked/c.jpg")
    for name in (b"/\xff.jpg", b"/caf\xe9/d.jpg", b"/caf\xe9/inner/e.jpg"):
        path = os.fsencode(tmp_path) + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"1")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "locked").chmod(0)
    folders = [tmp_path, *tmp_path.parents[:-2]]
    modes = [folder.stat().st_mode for folder in folders]
    root = os.geteuid() == 0
    try:
        if root:  # to whom no folder is locked
            for folder in folders:
                folder.chmod(0o755)
            os.seteuid(65534)
        source = open_source(str(tmp_path))
        rows = read_all(source)
    finally:
        if root:
            os.seteuid(0)
            for folder, mode in zip(folders, modes, strict=True):
                folder.chmod(mode)
        (tmp_path / "locked").chmod(0o755)
    assert [row["image_id"] for row in rows] == ["a.jpg"]
    assert source.left_out() == {
        "name that is not UTF-8": 3, "special file": 1, "unreadable folder": 1,
    }  # fmt: skip


def test_globs_leave_out_files_and_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "b.gif", "x/c.jpg", "x/y/d.jpg", "z/x/e.jpg")
    for globs, left in (
        (("*.gif",), ["a.jpg", "x/c.jpg", "x/y/d.jpg", "z/x/e.jpg"]),
        (("x",), ["a.jpg", "b.gif"]),
        (("x/*", "z/"), ["a.jpg", "b.gif"]),
        (("x/y",), ["a.jpg", "b.gif", "x/c.jpg", "z/x/e.jpg"]),
    ):
        source = open_source(str(tmp_path), SourceConfig(exclude=globs))
        assert [row["image_id"] for row in read_all(source)] == left
        assert source.left_out() == {"excluded file": 5 - len(left)}


def test_keys_that_no_path_can_name_are_counted(bucket: str) -> None:
    keys = ("a.jpg", "/b.jpg", "x//c.jpg", "x/../d.jpg", "x/y/e f+%20#?.jpg", "x//f.txt")
    for key in keys:
        body = picture(key)
        boto3.client("s3").put_object(Bucket="bucket", Key=f"keys/{key}", Body=body)
    source = open_source(f"{bucket}/keys/")
    rows = {row["image_id"]: row["bytes"] for row in read_all(source)}
    assert rows == {name: picture(name) for name in ("a.jpg", "x/y/e f+%20#?.jpg")}
    assert source.left_out() == {"key with //": 3, "key with . or ..": 1}
    lines = "".join(f"{bucket}/keys/{key}\n" for key in keys[:4])
    storage.write_bytes(f"{bucket}/keys/list.lst", lines.encode())
    source = open_source(f"{bucket}/keys/list.lst")
    assert [row["image_id"] for row in read_all(source)] == [f"{bucket}/keys/a.jpg"]
    assert source.left_out() == {"key with //": 2, "key with . or ..": 1}


def test_a_setting_that_says_nothing_to_a_source_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images", "a.jpg")
    write_parquet(tmp_path / "tables/x.parquet", 1)
    for spec, options, flag in (
        ("shapes", SourceConfig(captions="x.csv"), "captions"),
        ("shapes", SourceConfig(exclude=("*.jpg",)), "exclude"),
        (str(tmp_path / "tables"), SourceConfig(encoding="latin-1"), "encoding"),
        (str(tmp_path / "tables"), SourceConfig(missing="skip"), "missing"),
        (str(tmp_path / "images"), SourceConfig(subset="en"), "subset"),
        (str(tmp_path / "images"), SourceConfig(partial=True), "partial"),
    ):
        with pytest.raises(SourceError, match=f"source-options.{flag} says nothing to .*: {spec}$"):
            open_source(spec, options)


def test_a_folder_of_a_data_sets_name_is_not_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_source("shapes").num_images() == 2800
    assert "./shapes" not in caplog.text
    write_images(tmp_path, "shapes/a.jpg")
    assert open_source("shapes").num_images() == 2800
    assert "what lies here under it is ./shapes" in caplog.text
    assert open_source("./shapes").num_images() == 1
    # Also where the data set cannot be had.
    monkeypatch.setattr("captioner.sources.hub.snapshot_download", _fail)
    write_images(tmp_path, "flickr8k/a.jpg")
    with pytest.raises(SourceError, match="not in the hub's cache"):
        open_source("flickr8k")
    assert "what lies here under it is ./flickr8k" in caplog.text


def _fail(*_: object, **__: object) -> None:
    raise ConnectionError


def test_a_later_commit_of_the_hub_is_the_same_source() -> None:
    def key(uri: str, **options: str) -> str:
        return SourceIdentity(kind="parquet", uri=uri, options=options).key

    before, after = (f"hf:org/name@{digit * 40}" for digit in "1a")
    assert key(before) == key(after) != key(after, id_prefix="x/")
    assert key("/photos@2024") != key("/photos@2025") != key("/photos")
