"""A folder of images as a source: its captions and splits, and files that cannot be read."""

import json
import os
from pathlib import Path

import pytest

from captioner.config import ImageLimits, SourceConfig
from captioner.errors import SourceError
from captioner.sources import open_source
from tests.sources import captions_of, read_all, write_images


def test_equal_names_in_two_folders_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    write_images(tmp_path, "x/a.jpg", "y/a.jpg", "y/b.jpg")
    table = "image,caption\nx/a.jpg,One\ny/a.jpg,Two\nx/a.jpg,Three\n"
    (tmp_path / "captions.csv").write_text(table)
    source = open_source(str(tmp_path))
    assert source.num_images() == len(read_all(source)) == 3
    assert captions_of(source) == {"x/a.jpg": ["One", "Three"], "y/a.jpg": ["Two"]}


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


def test_real_originals(shared: Path) -> None:
    source = open_source(str(shared / "data/originals"))
    rows = read_all(source)
    assert len(rows) == 60
    assert all(row["bytes"].startswith(b"\xff\xd8") for row in rows)
    assert {name: len(texts) for name, texts in captions_of(source).items()} == {
        row["image_id"]: 5 for row in rows
    }
    assert os.path.getsize(rows[0]["uri"]) == len(rows[0]["bytes"])
