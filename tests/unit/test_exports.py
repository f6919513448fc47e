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

from captioner.artifacts.manifests import FileEntry
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


def export(photos: Path, **changes: Any) -> tuple[Path, list[FileEntry]]:
    """Written twice, as by a run that was killed and went on."""
    root = photos.parent / "out"
    config = CaptionConfig(images=str(photos), model="", output=str(root), **changes)
    output = Output(str(root), {"job": "test"})
    rows = [
        {
            "image_id": name,
            "uri": f"{photos}/{name}",
            "caption": caption,
            "log_prob": None if caption is None else -1.5,
            "alternatives": [{"caption": "other, one", "log_prob": -2.0}] if caption else None,
            "error": None if caption else "truncated",
            "error_kind": None if caption else "final",
        }
        for name, caption in CAPTIONS.items()
    ]
    entries = []
    (root / "captions").mkdir(exist_ok=True)
    for number, part in enumerate((rows[:2], rows[2:])):
        pq.write_table(
            pa.Table.from_pylist(part, CAPTIONED_ROWS), root / f"captions/{number}.parquet"
        )
        entries.append(FileEntry(path=f"captions/{number}.parquet", bytes=0, rows=len(part)))
    tables = tables_of(output, entries)
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
    assert caplog.messages[-1] == "1 files were there already, and were left as they are: 1.txt"
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


@pytest.mark.parametrize("name", ["../../out.jpg", "/etc/passwd.jpg", "a//b.jpg", "./c.jpg"])
def test_no_id_leads_out_of_the_tree(
    photos: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(CAPTIONS, name, "a way out")
    before = set(files(photos.parent))
    root, _ = export(photos, format="txt")
    new = set(files(photos.parent)) - before
    assert all(path.startswith("out/") for path in new)
    assert len(files(root / "txt")) == 5


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


def test_only_local_files_have_something_beside_them() -> None:
    config = CaptionConfig(images="s3://bucket/x", model="", output="", format="txt", beside=True)
    with pytest.raises(ConfigError, match="is not on this machine"):
        check_exports(config, "folder")
    with pytest.raises(ConfigError, match="no files of their own"):
        check_exports(config, "parquet")


def test_sentences_have_a_capital_and_a_stop() -> None:
    assert sentence("a dog") == "A dog."
    assert sentence("") == ""
    assert sentence("éa !") == "Éa !"
