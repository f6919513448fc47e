"""Which files below a folder are a source's images, and by what names."""

import os
from pathlib import Path

import pytest

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
    assert source.left_out() == {"hidden": 2, ".txt": 1}
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
