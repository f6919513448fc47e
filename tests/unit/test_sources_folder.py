"""A folder of images as a source: its captions and splits, and files that cannot be read."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner import storage
from captioner.config import ImageLimits, SourceConfig
from captioner.errors import SourceError, StoreError
from captioner.sources import open_source
from captioner.sources.splits import hashed_split
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


def test_a_split_column_is_honoured_in_tables(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    table = "image,caption,split\na.jpg,A,test\nb.jpg,B,Train\nc.jpg,C,dev\nd.jpg,D,unlabeled\n"
    for name, delimiter in (("captions.csv", ","), ("captions.tsv", "\t")):
        (tmp_path / name).write_text(table.replace(",", delimiter))
        rows = {row["image_id"]: row["split"] for row in read_all(open_source(str(tmp_path)))}
        # Neither what no list names nor what has a name of its own joins a published test split.
        assert list(rows.values()) == ["test", "train", "validation", "train", "train"]
        assert "1 'unlabeled'; source-options.split says where they belong" in caplog.text
        rows = {
            row["image_id"]: row["split"]
            for row in read_all(open_source(str(tmp_path), SourceConfig(split="validation")))
        }
        assert list(rows.values()) == ["test", "train", "validation", "validation", "validation"]
        (tmp_path / name).unlink()
    # Numbers of folds are no splits.
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,A,1\nb.jpg,B,2\n")
    for row in read_all(open_source(str(tmp_path))):
        assert row["split"] == hashed_split(row["image_id"])
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,A,test\na.jpg,B,train\n")
    with pytest.raises(SourceError, match="line 3: image a.jpg has two splits, 'test' and 'train'"):
        open_source(str(tmp_path))


def test_a_caption_goes_to_no_image_of_another_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "x/001.jpg", "x/002.jpg", "a/b/003.jpg", "top.jpg", "005.jpg")
    for table, absent in (
        ("y/001.jpg,A CAT", r"1 of 1 .*\(y/001.jpg"),
        ("x/002.jpg,A DOG\ny/001.jpg,A CAT", r"1 of 2 .*\(y/001.jpg"),
        ("b/001.jpg,A CAT\nb/003.jpg,A DOG", r"1 of 2 .*\(b/001.jpg"),
        ("z/b/003.jpg,A DOG", r"1 of 1 .*\(z/b/003.jpg"),
        # What is at the root has names without a folder, or this folder would be a deeper one for all.
        ("top.jpg,A CAT\ny/005.jpg,A DOG", r"1 of 2 .*\(y/005.jpg"),
    ):
        (tmp_path / "captions.csv").write_text(f"image,caption\n{table}\n")
        with pytest.raises(SourceError, match=absent):
            open_source(str(tmp_path))
    expected = {"a/b/003.jpg": ["A DOG"], "x/001.jpg": ["A CAT"]}
    for table in (
        "b/003.jpg,A DOG\n001,A CAT",
        # Of a tree in which this folder lies deeper, all names begin elsewhere.
        "photos/a/b/003.jpg,A DOG\nphotos\\x\\001.jpg,A CAT",
    ):
        (tmp_path / "captions.csv").write_text(f"image,caption\n{table}\n")
        assert captions_of(open_source(str(tmp_path))) == expected


def test_coco_with_the_images_of_one_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, "val2017/2.jpg", "val2017/3.jpg")
    (tmp_path / "annotations").mkdir()
    for split, numbers in (("train", [1]), ("val", [2, 3])):
        content = {
            "images": [{"id": number, "file_name": f"{number}.jpg"} for number in numbers],
            "annotations": [{"image_id": number, "caption": "A."} for number in numbers],
        }
        (tmp_path / f"annotations/captions_{split}2017.json").write_text(json.dumps(content))
        content["annotations"] = [{"image_id": numbers[0], "bbox": []}]
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    source = open_source(str(tmp_path))
    assert captions_of(source) == {"val2017/2.jpg": ["A."], "val2017/3.jpg": ["A."]}
    assert {row["split"] for row in read_all(source)} == {"validation"}
    assert "captions_train2017.json: 1 of 1 captioned pictures are not there" in caplog.text
    options = SourceConfig(captions=str(tmp_path / "annotations/captions_train2017.json"))
    with pytest.raises(SourceError, match="1 of 1 captioned pictures are not there"):
        open_source(str(tmp_path), options)


def test_blips_lists_of_karpathys_splits(tmp_path: Path) -> None:
    write_images(tmp_path, "val2014/1.jpg", "val2014/2.jpg", "train2014/3.jpg")
    train = [
        {"caption": "A.", "image": "val2014/1.jpg", "image_id": "coco_1"},
        {"caption": "B.", "image": "val2014/1.jpg", "image_id": "coco_1"},
        {"caption": "C.", "image": "train2014/3.jpg", "image_id": "coco_3"},
    ]
    val = [{"image": "val2014/2.jpg", "caption": ["D.", "E."]}]
    (tmp_path / "coco_karpathy_train.json").write_text(json.dumps(train))
    (tmp_path / "coco_karpathy_val.json").write_text(json.dumps(val))
    source = open_source(str(tmp_path))
    assert captions_of(source) == {
        "train2014/3.jpg": ["C."],
        "val2014/1.jpg": ["A.", "B."],
        "val2014/2.jpg": ["D.", "E."],
    }
    assert [row["split"] for row in read_all(source)] == ["train", "train", "validation"]


def test_img2datasets_files(tmp_path: Path) -> None:
    """Images, texts and JSON in folders, a Parquet file beside each folder, which also lists what was not there."""
    keys = ("000000000", "000000002")
    write_images(tmp_path, *(f"00000/{key}.jpg" for key in keys))
    for key in keys:
        (tmp_path / f"00000/{key}.txt").write_text(f"text {key}")
        (tmp_path / f"00000/{key}.json").write_text(json.dumps({"caption": f"text {key}"}))
    (tmp_path / "00000_stats.json").write_text('{"count": 3, "successes": 2}')
    numbers = range(3)
    table = {
        "url": ["u"] * 3,
        "key": [f"00000000{number}" for number in numbers],
        "caption": [f"text 00000000{number}" for number in numbers],
        "status": ["success", "failed_to_download", "success"],
    }
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    expected = {f"00000/{key}.jpg": [f"text {key}"] for key in keys}
    source = open_source(str(tmp_path))
    assert captions_of(source) == expected
    assert len(read_all(source)) == 2
    (tmp_path / "00000.parquet").unlink()
    assert captions_of(open_source(str(tmp_path))) == expected
    for path in tmp_path.rglob("*.txt"):
        path.unlink()
    assert captions_of(open_source(str(tmp_path))) == expected


def test_captions_that_were_not_understood_are_said_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, "a.jpg")
    (tmp_path / "results.csv").write_text("accuracy,loss\n1,2\n")
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    assert captions_of(open_source(str(tmp_path))) == {}
    assert "not captions: " in caplog.text
    assert "results.csv" in caplog.text
    assert "dataset_info.json" in caplog.text
    # A name that promises captions and holds none stops.
    (tmp_path / "captions.csv").write_text("accuracy,loss\n1,2\n")
    with pytest.raises(SourceError, match=r"captions.csv: not a captions file: .*captions none"):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path), SourceConfig(captions="none")).num_images() == 1


def test_two_files_that_caption_the_same_image_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,A\n")
    (tmp_path / "captions.tsv").write_text("image\tcaption\nb.jpg\tB\n")
    assert captions_of(open_source(str(tmp_path))) == {"a.jpg": ["A"], "b.jpg": ["B"]}
    (tmp_path / "captions.tsv").write_text("image\tcaption\na.jpg\tB\n")
    with pytest.raises(SourceError, match=r"captions of a.jpg are in .*csv and in .*tsv: choose"):
        open_source(str(tmp_path))
    options = SourceConfig(captions=str(tmp_path / "captions.tsv"))
    assert captions_of(open_source(str(tmp_path), options)) == {"a.jpg": ["B"]}


def test_heic_without_its_loader_is_counted_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, "a.jpg", "b.HEIC", "c.heic", "e.HIF")
    (tmp_path / "d").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1")
    assert len(read_all(open_source(str(tmp_path), SourceConfig(sniff=True)))) == 5
    monkeypatch.setattr("captioner.sources.image_files.has_loader", lambda name: False)
    source = open_source(str(tmp_path), SourceConfig(sniff=True))
    assert [row["image_id"] for row in read_all(source)] == ["a.jpg"]
    assert source.left_out() == {
        ".heic (needs the extra heif)": 2,
        ".hif (needs the extra heif)": 1,
        "no suffix": 1,
    }


def test_ids_of_ones_own_are_kept(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg")
    head = "image,caption,sku\n"
    (tmp_path / "captions.csv").write_text(f"{head}a.jpg,A,x-1\nb.jpg,B,x-2\na.jpg,C,x-1\n")
    source = open_source(str(tmp_path), SourceConfig(id_column="SKU"))
    assert captions_of(source) == {"x-1": ["A", "C"], "x-2": ["B"]}
    assert [row["image_id"] for row in read_all(source)] == ["x-1", "x-2"]
    images = open_source(str(tmp_path), SourceConfig(id_column="SKU"), captions=False)
    assert [row["image_id"] for row in read_all(images)] == ["x-1", "x-2"]
    for rows, message in (
        ("a.jpg,A,1\nb.jpg,B,1\n", "a.jpg and b.jpg have the same id '1'"),
        ("a.jpg,A,1\n", "image b.jpg has no id"),
        ("a.jpg,A,1\na.jpg,A,2\n", "image a.jpg has two ids, '1' and '2'"),
    ):
        (tmp_path / "captions.csv").write_text(head + rows)
        with pytest.raises(SourceError, match=message):
            open_source(str(tmp_path), SourceConfig(id_column="sku"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "c.jpg,A cat",
            "1 of 1 captioned pictures are not there .c.jpg.; source-options.captions none",
        ),
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


def test_a_flag_that_finds_nothing_is_one_line(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg")
    for name, text, options, told in (
        (None, "", {"caption_columns": ["x"]}, "source-options.caption-columns: no captions file in"),
        ("a.txt", "A", {"id_column": "x"}, "source-options.id-column: no captions file in"),
        ("data.csv", "image,text\na.jpg,A\n", {"split_column": "x"}, "no column 'x'"),
        ("captions.token", "a.jpg#0\tA\n", {"image_column": "x"}, "token lines have no columns, which"),
        ("captions.csv", "image,text\nb.jpg,A\n", {}, "1 of 1 captioned pictures are not there"),
        ("dataset_x.json", '[{"image": "x/a.jpg", "raw": "A"}, {"image": "x/b.jpg", "raw": "A"}]', {}, "1 of 2"),
        ("results.csv", "image,text\nb.jpg,A\n", {}, "1 of 1 captioned pictures are not there"),
        ("captions.csv", "image,text\na.jpg,A\n", {"captions": "gone.csv"}, "gone.csv"),
    ):  # fmt: skip
        if name is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(SourceError, match=told) as raised:
            open_source(str(tmp_path), SourceConfig.model_validate(options))
        assert "\n" not in str(raised.value)
        if name is not None:
            (tmp_path / name).unlink()


def test_a_text_file_may_have_its_images_whole_name(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "a.png", "deep/b.jpg", "c.jpg")
    for name, text in (("a.jpg.txt", "one\ntwo"), ("a.png.txt", "three"), ("deep/b.txt", "four")):
        (tmp_path / name).write_text(f"{text}\n")
    assert captions_of(open_source(str(tmp_path))) == {
        "a.jpg": ["one", "two"],
        "a.png": ["three"],
        "deep/b.jpg": ["four"],
    }


def test_what_cannot_be_opened_is_sniffed_as_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, "a.jpg", "kept to himself")
    open_input = storage.open_input

    def denied(uri: str) -> Any:
        if uri.endswith("himself"):
            raise StoreError("cannot open: Permission denied")
        return open_input(uri)

    monkeypatch.setattr("captioner.sources.image_files.storage.open_input", denied)
    source = open_source(str(tmp_path), SourceConfig(sniff=True))
    assert source.left_out() == {"no suffix": 1}
