"""A collection's captions in the forms of other programs."""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from captioner.artifacts.manifests import FileEntry, SourceIdentity
from captioner.artifacts.output import Output
from captioner.artifacts.tables import CAPTIONED_ROWS
from captioner.captioning.exports import check_exports, write_exports
from captioner.captioning.stage import sentence
from captioner.config import CaptionConfig
from captioner.errors import ConfigError
from tests.captioned import tables_of
from tests.pictures import picture

ODD = 'a dog says "no", & <eats> 写真'
CAPTIONS = {
    "1.jpg": "a dog",
    "deep/2.jpg": ODD,
    "deep/2.png": "a cat",
    "deep/er/é #3.jpg": "a bird",
    "bad.jpg": None,
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(CAPTIONS):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number, "PNG" if name.endswith("png") else "JPEG"))
    return tmp_path / "photos"


def export(
    photos: Path,
    *,
    own_ids: bool = False,
    source: SourceIdentity | None = None,
    **changes: Any,
) -> tuple[Path, list[FileEntry]]:
    """Written twice, as by a run that was killed and went on.

    Args:
        own_ids: the user's, which are no paths.
    """
    root = photos.parent / "out"
    config = CaptionConfig(images=str(photos), model="", output=str(root), **changes)
    output = Output(str(root), {"job": "test"})
    rows = [
        {
            "image_id": f"id {number}" if own_ids else name,
            "uri": f"{photos}/{name}",
            "caption": caption,
            "log_prob": None if caption is None else -1.5,
            "alternatives": [{"caption": "other, one", "log_prob": -2.0}] if caption else None,
            "error": None if caption else "truncated",
            "error_kind": None if caption else "final",
        }
        for number, (name, caption) in enumerate(CAPTIONS.items())
    ]
    entries = []
    (root / "captions").mkdir(exist_ok=True)
    for number, part in enumerate((rows[:2], rows[2:])):
        pq.write_table(
            pa.Table.from_pylist(part, CAPTIONED_ROWS), root / f"captions/{number}.parquet"
        )
        entries.append(FileEntry(path=f"captions/{number}.parquet", bytes=0, rows=len(part)))
    source = source or SourceIdentity(kind="folder", uri=str(photos))
    tables = tables_of(output, entries, source)
    write_exports(output, tables, config)
    found = write_exports(output, tables, config)
    output.close()
    return root, found


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_csv_is_read_by_pandas_and_python(photos: Path) -> None:
    root, (entry,) = export(photos, format="csv")
    assert (entry.path, entry.rows) == ("captions.csv", 5)
    data = (root / "captions.csv").read_bytes()
    assert len(data) == entry.bytes
    frame = pd.read_csv(io.BytesIO(data))
    assert dict(zip(frame["image_id"], frame["caption"], strict=True))["deep/2.jpg"] == ODD
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    assert [row["caption"] for row in rows] == [text or "" for text in CAPTIONS.values()]
    assert json.loads(rows[0]["alternatives"]) == ["other, one"]
    assert rows[-1]["error"] == "truncated"


def test_every_picture_has_its_text_file_in_a_tree_of_their_own(photos: Path) -> None:
    root, listed = export(photos, format="txt")
    assert listed == []
    assert files(root / "txt") == ["1.txt", "deep/2.jpg.txt", "deep/2.png.txt", "deep/er/é #3.txt"]
    assert (root / "txt/deep/2.jpg.txt").read_text() == f"{ODD}\n"
    assert len(files(photos)) == len(CAPTIONS)


def test_xmp_holds_the_description(photos: Path) -> None:
    root, _ = export(photos, format="xmp")
    tree = ElementTree.fromstring((root / "xmp/deep/2.jpg.xmp").read_bytes())
    path = ".//{http://purl.org/dc/elements/1.1/}description//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
    (item,) = tree.findall(path)
    assert item.text == ODD
    assert item.attrib["{http://www.w3.org/XML/1998/namespace}lang"] == "x-default"


def test_files_beside_pictures_are_written_and_never_over_others(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "1.txt").write_text("mine")
    root, _ = export(photos, format="txt", beside=True)
    new = set(files(photos)) - {*CAPTIONS}
    assert new == {"1.txt", "deep/2.jpg.txt", "deep/2.png.txt", "deep/er/é #3.txt"}
    assert (photos / "1.txt").read_text() == "mine"
    assert (photos / "deep/er/é #3.txt").read_text() == "a bird\n"
    there = f"1 files were there already, and were left as they are: {photos}/1.txt"
    assert caplog.messages[-1] == there
    assert not (root / "txt").exists()


@pytest.mark.parametrize("beside", [True, False])
def test_datasets_opens_the_imagefolder(photos: Path, tmp_path: Path, beside: bool) -> None:
    root, listed = export(photos, format="imagefolder", beside=beside, copy_pictures=not beside)
    place = photos if beside else root / "imagefolder"
    if beside:
        assert listed == []
        (photos / "bad.jpg").unlink()  # a picture without a caption has no line
    else:
        assert [entry.path for entry in listed] == ["imagefolder/metadata.jsonl"]
        assert (place / "deep/2.png").read_bytes() == (photos / "deep/2.png").read_bytes()
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(place), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(found["text"]) == sorted(text for text in CAPTIONS.values() if text)
    assert found[0]["image"].size == (96, 72)


def loaded(place: Path, cache: Path) -> dict[str, list[str]]:
    found = datasets.load_dataset("imagefolder", data_dir=str(place), cache_dir=str(cache))
    return {split: sorted(rows["text"]) for split, rows in found.items()}


SPLIT = {
    "folders": ["train/1.jpg", "train/deep/2.jpg", "test set/3.jpg"],
    "some folders": ["1.jpg", "val/2.jpg", "val~/2.jpg"],
    "files": ["1.jpg", "my-test.jpg"],
    "none": ["1.jpg", "contest/2.jpg", "validate.jpg"],
}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("names", SPLIT)
def test_datasets_finds_every_caption_whatever_it_takes_for_splits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    names: str,
    beside: bool,
) -> None:
    captions = {name: f"caption of {name}" for name in SPLIT[names]}
    monkeypatch.setattr(f"{__name__}.CAPTIONS", captions)
    photos = tmp_path / "photos"
    for number, name in enumerate(captions):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(picture(number))
    root, listed = export(photos, format="imagefolder", beside=beside, copy_pictures=not beside)
    assert sum(entry.rows or 0 for entry in listed) == (0 if beside else 3 - (names == "files"))
    place, cache = photos if beside else root / "imagefolder", tmp_path / "cache"
    whole = {"train": sorted(captions.values())}
    by_folder = {
        "train": ["caption of train/1.jpg", "caption of train/deep/2.jpg"],
        "test": ["caption of test set/3.jpg"],
    }
    told = "imagefolder: datasets takes words such as test in names for splits"
    lost = beside and names in ("some folders", "files")
    assert any(line.startswith(told) for line in caplog.messages) == lost
    if names == "folders":
        assert loaded(place, cache) == by_folder
    elif not lost:
        assert loaded(place, cache) == whole
    elif names == "some folders":
        assert loaded(place, cache) == {"validation": ["caption of val/2.jpg"]}


@pytest.mark.parametrize("name", ["../../out.jpg", "/etc/passwd.jpg", "a//b.jpg", "./c.jpg"])
def test_no_id_leads_out_of_the_tree(
    photos: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(CAPTIONS, name, "a way out")
    before = set(files(photos.parent))
    root, _ = export(photos, format="txt", source=SourceIdentity(kind="parquet", uri="elsewhere"))
    new = set(files(photos.parent)) - before
    assert all(path.startswith("out/") for path in new)
    assert len(files(root / "txt")) == 5


# Another picture's sidecar would be the same file, on some file system at least.
AMONG = {
    "a.jpg": "one",
    "A.png": "two",
    "a.jpg.png": "three",
    "line\nbreak.jpg": "four",
    "line_break.jpg": "five",
    "\u5199" * 83 + ".jpg": "six",
    "\u5199" * 83 + ".png": "seven",
}


@pytest.mark.parametrize("beside", [True, False])
def test_every_picture_has_a_file_of_its_own(
    photos: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    monkeypatch.setattr(f"{__name__}.CAPTIONS", AMONG)
    root, _ = export(photos, format="txt", beside=beside)
    texts = {file.name.lower(): file.read_text() for file in root.parent.rglob("*.txt")}
    assert sorted(texts.values()) == sorted(f"{text}\n" for text in AMONG.values())
    assert texts["a.jpg.png.txt"] == "three\n"
    if beside:
        assert texts["line\nbreak.txt"] == "four\n"


def test_copies_have_names_of_their_own(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["deep/2.jpg", "deep\x1f/2.jpg", "deep_/2.jpg"]
    monkeypatch.setattr(f"{__name__}.CAPTIONS", dict.fromkeys(names, "a dog"))
    for number, name in enumerate(names):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"%d" % number)
    root, _ = export(photos, format="imagefolder", copy_pictures=True)
    lines = (root / "imagefolder/metadata.jsonl").read_text().splitlines()
    found = [json.loads(line)["file_name"] for line in lines]
    assert found[0] == "deep/2.jpg"
    assert all(name.startswith("deep_/") and name.endswith(".jpg") for name in found[1:])
    assert [(root / "imagefolder" / name).read_bytes() for name in found] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("prefix", [None, "trip/", "x-"])
@pytest.mark.parametrize("own_ids", [True, False])
def test_files_are_named_after_pictures_whatever_their_ids(
    photos: Path, own_ids: bool, prefix: str | None
) -> None:
    source = SourceIdentity(kind="folder", uri=str(photos), options={"id_prefix": prefix})
    root, _ = export(photos, format="xmp", own_ids=own_ids, source=source)
    export(photos, format="txt", beside=True, own_ids=own_ids, source=source)
    export(photos, format="imagefolder", beside=True, own_ids=own_ids, source=source)
    mirrored = ["1.xmp", "deep/2.jpg.xmp", "deep/2.png.xmp", "deep/er/é #3.xmp"]
    assert files(root / "xmp") == [(prefix or "") + path for path in mirrored]
    assert (photos / "deep/2.png.txt").read_text() == "a cat\n"
    lines = map(json.loads, (photos / "metadata.jsonl").read_text().splitlines())
    assert [line["file_name"] for line in lines] == [name for name in CAPTIONS if CAPTIONS[name]]


def test_a_single_picture_and_a_list_have_their_files_below_their_folder(photos: Path) -> None:
    for name in ("1.jpg", "list.txt"):
        source = SourceIdentity(kind="folder", uri=f"{photos}/{name}")
        root, _ = export(photos, format="txt", own_ids=True, source=source)
        assert "deep/2.png.txt" in files(root / "txt")


@pytest.mark.parametrize("there", ["folder", "broken link", "unreadable"])
def test_whatever_is_beside_a_picture_stays(
    photos: Path, caplog: pytest.LogCaptureFixture, there: str
) -> None:
    place = photos / "1.txt"
    if there == "folder":
        place.mkdir()
    elif there == "broken link":
        place.symlink_to("nowhere")
    else:
        place.symlink_to(photos / "1.txt")  # a loop, which opens for nobody
    export(photos, format="txt", beside=True)
    assert place.is_symlink() or place.is_dir()
    assert "1 files were there already" in caplog.messages[-1]


def test_odd_characters_break_no_file(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = 'two\nlines, a "quote"; ]]> \x0b\x00 {brace} \ud83d\ude00'.encode(
        "utf-16", "surrogatepass"
    ).decode("utf-16")
    monkeypatch.setitem(CAPTIONS, "1.jpg", odd)
    root, _ = export(photos, format="xmp")
    tree = ElementTree.fromstring((root / "xmp/1.xmp").read_bytes())
    (item,) = tree.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li")
    assert item.text == odd.replace("\x0b\x00", "")
    root, _ = export(photos, format="txt")
    assert len((root / "txt/1.txt").read_text().splitlines()) == 1
    root, _ = export(photos, format="csv")
    rows = list(csv.DictReader(io.StringIO((root / "captions.csv").read_text())))
    assert rows[0]["caption"] == odd
    root, _ = export(photos, format="jsonl")
    assert json.loads((root / "captions.jsonl").read_bytes().split(b"\n")[0])["caption"] == odd


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beside": True}, "beside: is for txt, xmp and imagefolder, not for parquet"),
        ({"format": "txt", "copy_pictures": True}, "copy_pictures: is for imagefolder"),
        ({"format": "imagefolder", "beside": True, "copy_pictures": True}, "leave out"),
    ],
)
def test_flags_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CaptionConfig(images="", model="", output="", **changes)


def test_only_local_files_have_something_beside_them(photos: Path) -> None:
    def check(*sources: SourceIdentity, **changes: Any) -> None:
        options = {"images": str(photos), "model": "", "output": "", "format": "txt"}
        check_exports(CaptionConfig.model_validate(options | changes), sources)

    here = SourceIdentity(kind="folder", uri=str(photos))
    table = SourceIdentity(kind="parquet", uri="/table")
    remote = SourceIdentity(kind="folder", uri="s3://bucket/x")
    other = SourceIdentity(kind="folder", uri="/elsewhere")
    with pytest.raises(ConfigError, match="is not on this machine"):
        check(remote, beside=True)
    with pytest.raises(ConfigError, match="/table are no files of their own"):
        check(table, beside=True)
    # What is extended has pictures, too.
    with pytest.raises(ConfigError, match="copy_pictures: the pictures of /table are no files"):
        check(here, table, format="imagefolder", copy_pictures=True)
    with pytest.raises(ConfigError, match="an imagefolder is one folder.* /elsewhere, too"):
        check(here, other, format="imagefolder", beside=True)
    check(here, table)
    check(here, other, beside=True)
    check(remote, other, format="imagefolder", copy_pictures=True)


def test_sentences_have_a_capital_and_a_stop() -> None:
    assert sentence("a dog") == "A dog."
    assert sentence("") == ""
    assert sentence("éa !") == "Éa !"
    assert (
        sentence("\u0928\u092e\u0938\u094d\u0924\u0947")
        == "\u0928\u092e\u0938\u094d\u0924\u0947\u0964"
    )
    assert sentence("\u5199\u771f") == "\u5199\u771f\u3002"
    assert sentence("\u0e2b\u0e21\u0e32") == "\u0e2b\u0e21\u0e32"
